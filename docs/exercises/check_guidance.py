"""The checks of exercise 4. They know the usual mistakes by name."""
import torch


def problem():
    """The answers with and without a prompt, [h, w, C], both about as long."""
    torch.manual_seed(0)
    return torch.randn(3, 2, 4), torch.randn(3, 2, 4)


def check_the_arguments_are_kept(guide):
    conditional, unconditional = problem()
    guide(conditional, unconditional, 4.0, renormalise=True)
    kept = torch.equal(conditional, problem()[0]) and torch.equal(unconditional, problem()[1])
    assert kept, "the two answers must not be written to: the sampler still needs them"


def check_the_plain_form(guide):
    conditional, unconditional = problem()
    nothing = guide(conditional, unconditional, 1.0)
    counted_from_zero = 2 * conditional - unconditional
    assert not torch.allclose(nothing, counted_from_zero, atol=1e-5), \
        "scale counts from 1 here: 1 means no guidance"
    assert not torch.allclose(nothing, unconditional, atol=1e-5), \
        "the two answers have each other's place"
    assert torch.allclose(nothing, conditional, atol=1e-5), \
        "with scale 1 the conditional answer comes back"
    assert torch.allclose(guide(conditional, unconditional, 0.0), unconditional, atol=1e-5), \
        "scale 0: no prompt"
    expected = unconditional + 4.0 * (conditional - unconditional)
    assert torch.allclose(guide(conditional, unconditional, 4.0), expected, atol=1e-5), \
        "this is not equation (14)"


def check_the_renormalised_form(guide):
    conditional, unconditional = problem()
    guided = guide(conditional, unconditional, 4.0)
    shrunk = guide(conditional, unconditional, 4.0, renormalise=True)
    assert guided.norm() > conditional.norm()
    assert not torch.allclose(shrunk, guided, atol=1e-5), \
        "a guided answer that is too long must be shrunk"
    lengths = shrunk.norm(dim=-1)
    per_token = torch.allclose(lengths, conditional.norm(dim=-1), atol=1e-4)
    assert not per_token, \
        "one factor for the whole image: a factor for each token changes the direction"
    assert torch.allclose(shrunk.norm(), conditional.norm(), rtol=1e-4), \
        "it must become as long as the conditional one"
    direction = torch.cosine_similarity(shrunk.flatten(), guided.flatten(), dim=0)
    assert abs(float(direction) - 1) < 1e-4, "only the length may change, not the direction"


def check_that_nothing_is_stretched(guide):
    conditional, unconditional = problem()
    near = 0.5 * conditional + 0.01 * unconditional
    plain = guide(conditional, near, 0.5)
    assert plain.norm() < conditional.norm()
    kept = guide(conditional, near, 0.5, renormalise=True)
    assert torch.allclose(kept, plain, atol=1e-5), \
        "an answer that is shorter already must not be stretched"


def check(guide):
    """Raises AssertionError, whose message names the mistake, if the answer is wrong."""
    check_the_arguments_are_kept(guide)
    check_the_plain_form(guide)
    check_the_renormalised_form(guide)
    check_that_nothing_is_stretched(guide)
