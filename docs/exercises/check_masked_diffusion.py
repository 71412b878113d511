"""The checks of exercise 3. They know the usual mistakes by name."""
import math

import torch

B, N, C, WIDTH, M = 2, 6, 4, 3, 4


class Network:
    """Notes what it is asked, and gives a fixed answer in the first C columns."""

    def __init__(self, answer=None):
        self.answer = answer
        self.asked = []

    def __call__(self, x_t, t, z):
        self.asked.append((x_t, t, z))
        noise = torch.zeros_like(x_t) if self.answer is None else self.answer
        variance = torch.full_like(x_t, 5.0)
        return torch.cat([noise, variance], dim=-1)


def problem():
    """The arguments behind net. The tables are those of Harmon: a cosine in 1000 steps."""
    torch.manual_seed(0)
    u = torch.arange(1001, dtype=torch.float64) / 1000
    squares = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - squares[1:] / squares[:-1]).clamp(max=0.999)
    alphas_cumprod = (1 - betas).cumprod(0).float()
    latents = torch.randn(B, N, C)
    z = torch.randn(B, N, WIDTH)
    masked = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5]])
    t = torch.tensor([[10, 300, 700, 990], [500, 40, 20, 800]])
    noise = torch.randn(B, M, C)
    return latents, z, masked, t, noise, alphas_cumprod


def hidden(values, masked):
    """values [B, N, K] at the places masked [B, M], one token a row."""
    return torch.cat([values[image, masked[image]] for image in range(B)])


def check_what_the_network_sees(loss):
    latents, z, masked, t, noise, alphas_cumprod = problem()
    net = Network()
    loss(net, latents, z, masked, t, noise, alphas_cumprod)
    x_t, asked_t, asked_z = (torch.cat(parts) for parts in zip(*net.asked))
    assert len(x_t) != B * N, \
        "the network must be asked about the hidden tokens only, not about all"
    assert len(x_t) == B * M, "the network must be asked once for each hidden token"
    assert torch.equal(asked_t, t.flatten()), \
        "each token's own t, an integer from 0 to 999, in the order of `masked`"

    x_0 = hidden(latents, masked)
    eps = noise.flatten(0, 1)
    abar = alphas_cumprod[t.flatten()][:, None]
    assert not torch.allclose(x_t, abar * x_0 + (1 - abar) * eps, atol=1e-5), \
        "the factors are square roots"
    swapped = (1 - abar).sqrt() * x_0 + abar.sqrt() * eps
    assert not torch.allclose(x_t, swapped, atol=1e-5), \
        "the token and the noise have each other's factor"
    one_t = alphas_cumprod[t[:, :1].expand(B, M).flatten()][:, None]
    one_t = one_t.sqrt() * x_0 + (1 - one_t).sqrt() * eps
    assert not torch.allclose(x_t, one_t, atol=1e-5), \
        "every token has its own t, not one for its image"
    unpicked = abar.sqrt() * latents[:, :M].flatten(0, 1) + (1 - abar).sqrt() * eps
    assert not torch.allclose(x_t, unpicked, atol=1e-5), \
        "the first M tokens are not the hidden ones"
    assert torch.allclose(x_t, abar.sqrt() * x_0 + (1 - abar).sqrt() * eps, atol=1e-5), \
        "x_t is not equation (7)"
    assert torch.equal(asked_z, hidden(z, masked)), \
        "each hidden token needs the condition of its own place"


def check_the_loss(loss):
    latents, z, masked, t, noise, alphas_cumprod = problem()
    eps = noise.flatten(0, 1)
    right = loss(Network(eps), latents, z, masked, t, noise, alphas_cumprod)
    assert right.shape == (), "the loss is a scalar"
    clean = loss(Network(hidden(latents, masked)), latents, z, masked, t, noise, alphas_cumprod)
    assert not float(clean) < 1e-6, "the network predicts the noise, not the clean token"
    assert float(right) < 1e-6, \
        "a network that knows the noise has loss 0: only the first C numbers count"

    nothing = loss(Network(), latents, z, masked, t, noise, alphas_cumprod)
    per_place = noise.square().sum() / (B * N * C)
    assert not torch.allclose(nothing, per_place), \
        "the mean is over the hidden tokens, not over all places"
    assert torch.allclose(nothing, noise.square().mean()), \
        "the loss is the mean of the squared error"


def check_the_gradients(loss):
    latents, z, masked, t, noise, alphas_cumprod = problem()
    z.requires_grad_(True)

    def net(x_t, t, z):
        return torch.cat([z[:, :1] + x_t, x_t], dim=-1)

    loss(net, latents, z, masked, t, noise, alphas_cumprod).backward()
    assert z.grad is not None, \
        "the gradient must reach z, and through it the decoder and the language model"
    reached = z.grad.abs().sum(-1) > 0
    expected = torch.zeros(B, N, dtype=torch.bool).scatter(1, masked, True)
    assert torch.equal(reached, expected), \
        "the gradient must reach z at the hidden places, and nowhere else"


def check(loss):
    """Raises AssertionError, whose message names the mistake, if the answer is wrong."""
    check_what_the_network_sees(loss)
    check_the_loss(loss)
    check_the_gradients(loss)
