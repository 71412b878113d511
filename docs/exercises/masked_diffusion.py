"""Exercise 3: Harmon's loss on hidden tokens, equations (7) and (9) of the paper.

Harmon cuts an image into N tokens, each a vector of C real numbers. Most of them are hidden. From
the visible ones, and from the prompt, the language model and a decoder make a condition z for every
place. No softmax can predict a vector of real numbers, so the last part is a small diffusion model
for single tokens. It is trained as follows:

    x_t = sqrt(abar_t) · x_0  +  sqrt(1 - abar_t) · noise        equation (7): a token x_0, noised
    loss = mean of (noise - predicted noise)²                    equation (9)

abar_t says how much of the token's variance is left at timestep t: nearly 1 at t = 0, nearly 0 at t
= 999. Each hidden token has its own t and its own noise. The network sees the noised token, its t
and its z, and answers with 2 C numbers for each token: the first C are the predicted noise. (The
other C are about its variance, and have a loss of their own that is not part of this exercise.)

The loss is taken on the hidden tokens only. To ask for a visible token would be too easy: the
condition knows it already.

Run this file to check your answer. Our own: `diffusion_terms` in reca_harmon.py, section 2, on the
tokens that `take` picks out.
"""


def masked_diffusion_loss(net, latents, z, masked, t, noise, alphas_cumprod):
    """The noise prediction loss of the hidden tokens of B images -> scalar, their mean.

    net             net(x_t [R, C], t [R], z [R, Dz]) -> [R, 2 C], for any number R of tokens
    latents         float [B, N, C]: all tokens, clean
    z               float [B, N, Dz]: a condition for every place
    masked          int64 [B, M]: the places of the hidden tokens in their image
    t               int64 [B, M]: a timestep for each hidden token, 0 to 999
    noise           float [B, M, C]: noise for each hidden token
    alphas_cumprod  float [1000]: abar_t
    """
    raise NotImplementedError("fill in masked_diffusion_loss, then run this file again")


if __name__ == "__main__":
    from check_masked_diffusion import check
    check(masked_diffusion_loss)
    print("right")
