"""The checks of exercise 1. They know the usual mistakes by name."""
import torch


def problem(events):
    """A weight, and two losses of two shares each that depend on it. `events` notes the order."""
    weight = torch.tensor([1.0, -2.0], requires_grad=True)

    def shares(name, factors):
        def compute():
            for number, factor in enumerate(factors):
                events.append(f"{name} {number} computed")
                yield factor * (weight ** 2).sum()
        return compute

    losses = {"recon": shares("recon", (1.0, 2.0)), "i2t": shares("i2t", (0.25, 0.5))}
    return weight, losses


def check_nothing_holds_a_graph(objective):
    _, losses = problem([])
    total, values = objective(losses, {"recon": 1.0, "i2t": 1.0}, torch.Tensor.backward)
    held = [tensor.requires_grad for tensor in (total, *values.values())]
    assert not any(held), "what is returned must be detached, or it holds the graphs of all shares"


def check_the_values(objective):
    _, losses = problem([])
    total, values = objective(losses, {"recon": 1.0, "i2t": 0.5}, torch.Tensor.backward)
    assert set(values) == {"recon", "i2t"}, \
        "the dict must have one entry for each loss that was computed"
    assert abs(float(values["recon"]) - 15.0) < 1e-5, \
        "L_recon is the sum of its shares (not their mean)"
    assert abs(float(values["i2t"]) - 3.75) < 1e-5, \
        "the dict holds the losses without their weights λ"
    assert abs(float(total) - 16.875) < 1e-4, "L is the sum of λ times loss"


def check_the_gradients(objective):
    weight, losses = problem([])
    objective(losses, {"recon": 1.0, "i2t": 0.5}, torch.Tensor.backward)
    assert weight.grad is not None, "backward was never called"
    expected = torch.tensor([2.0, -4.0]) * (3.0 + 0.5 * 0.75)
    assert torch.allclose(weight.grad, expected), \
        "each share goes backward once, multiplied by its own λ"


def check_a_loss_that_is_switched_off(objective):
    def captions():
        raise AssertionError(
            "a loss whose λ is 0 must not be computed: there may be no captions for it")

    _, losses = problem([])
    losses["t2i"] = captions
    total, values = objective(losses, {"recon": 1.0, "i2t": 1.0, "t2i": 0.0}, torch.Tensor.backward)
    assert "t2i" not in values, "a loss that was not computed has no value"
    assert abs(float(total) - 18.75) < 1e-4, "L is the sum of λ times loss"


def check_one_share_at_a_time(objective):
    events = []
    _, losses = problem(events)

    def backward(share):
        events.append("backward")
        share.backward()

    objective(losses, {"recon": 1.0, "i2t": 1.0}, backward)
    alternating = [event == "backward" for event in events] == [False, True] * 4
    assert alternating, \
        "each share goes backward before the next is computed, or memory must hold both"


def check(objective):
    """Raises AssertionError, whose message names the mistake, if the answer is wrong."""
    check_nothing_holds_a_graph(objective)
    check_the_values(objective)
    check_the_gradients(objective)
    check_a_loss_that_is_switched_off(objective)
    check_one_share_at_a_time(objective)
