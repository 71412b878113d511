"""Exercise 4: classifier-free guidance, equation (14) of the paper.

A sampler asks the model twice at each step: once with the prompt, once without it. The difference
between the two answers points to where the prompt wants to go, and guidance goes further that way:

    guided = unconditional + scale · (conditional - unconditional)

With this count a scale of 1 means no guidance. (Papers differ: Show-o's original counts from 0, and
its (1 + s) · conditional - s · unconditional is ours with scale = s + 1.)

A guided answer is often too long, and pictures get hard colors. BAGEL therefore shrinks it back:

    guided · |conditional| / |guided|

where | | is the length of the whole answer, over all places and channels at once, so that its
direction stays. It is only ever made shorter, never longer.

RecA changes nothing here. It trains what the model answers with a prompt, and the sampler stays as
it was (appendix B).

Run this file to check your answer. Our own: `guide` in reca_bagel.py, section 6, for one image; the
plain form is also in the samplers of the other three scripts.
"""


def guide(conditional, unconditional, scale, renormalise=False):
    """Answers with and without the prompt, [h, w, C] of one image -> the guided one, [h, w, C].

    scale        1: the conditional answer itself; more: further away from the unconditional one
    renormalise  True: shrink the guided answer to the length of the conditional one, where it is
                 longer
    """
    raise NotImplementedError("fill in guide, then run this file again")


if __name__ == "__main__":
    from check_guidance import check
    check(guide)
    print("right")
