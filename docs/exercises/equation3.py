"""Exercise 1: the objective of RecA, equation (3) of the paper.

    L = λ_recon · L_recon  +  λ_i2t · L_i2t  +  λ_t2i · L_t2i

L_recon is RecA: the model's own generation loss, conditioned on its understanding embeddings. L_i2t
keeps understanding alive, and L_t2i is the usual training from captions, which RecA switches off
with λ_t2i = 0. A loss that is switched off must not even be computed: there may be no captions at
all.

The sum is not built as one large graph. A loss comes in *shares*, one for each micro-batch, that
add up to it. Each share goes backward as soon as it is there: its graph is then freed, and the peak
of memory is that of a single micro-batch. The gradients add up by themselves, because backward()
adds to what .grad holds already.

Run this file to check your answer. Our own: `objective` in common.py, section "Equation (3)".
"""


def objective(losses, weights, backward):
    """One evaluation of equation (3), with its gradients.

    losses    {"recon": function, ...}: calling a function gives an iterator over the shares of that
              loss, scalar tensors with a graph. They are computed one by one, when asked for
    weights   {"recon": λ_recon, ...}: a number for each loss. Where it is 0, the loss is not
              computed
    backward  function of one scalar tensor, to be called once for each share

    Returns (L, {"recon": L_recon, ...}): detached tensors. L is the weighted sum, while the dict
    holds the losses as they are, without their weights, and only those that were computed.
    """
    raise NotImplementedError("fill in objective, then run this file again")


if __name__ == "__main__":
    from check_equation3 import check
    check(objective)
    print("right")
