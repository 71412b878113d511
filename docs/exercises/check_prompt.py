"""The checks of exercise 2. They know the usual mistakes by name."""
import torch
from torch import nn

IMAGE = 9               # the id of an image place
PLACES = torch.tensor([[2, 3, 4], [4, 5, 6]])


def problem():
    """Two prompts of 8 ids with 3 image places each, at different positions -> ids, und, words."""
    torch.manual_seed(0)
    words = nn.Embedding(10, 5)
    ids = torch.tensor([[1, 2, 9, 9, 9, 3, 4, 5],
                        [1, 2, 3, 4, 9, 9, 9, 5]])
    und = torch.randn(2, 3, 5, requires_grad=True)
    return ids, und, words


def check_where_the_embeddings_are(embed_prompt):
    ids, und, words = problem()
    prompt = embed_prompt(ids, und, words, IMAGE)
    assert prompt.shape == (2, 8, 5), "the prompt keeps its length: an embedding replaces a place"
    first, second = (prompt[row, PLACES[row]] for row in (0, 1))
    assert not torch.allclose(first, und[0] + words(torch.tensor(IMAGE))), \
        "replace what is there, do not add to it"
    assert not torch.allclose(first, und[0].flip(0)), "the embeddings stand in reverse order"
    assert torch.allclose(first, und[0]), \
        "the first prompt's image places must hold und[0], in order"
    assert not torch.allclose(second, und[0]), "every prompt has got the first image"
    assert torch.allclose(second, und[1]), \
        "the second prompt has its image places elsewhere than the first"


def check_the_words(embed_prompt):
    ids, und, words = problem()
    before = words.weight.detach().clone()
    prompt = embed_prompt(ids, und, words, IMAGE)
    is_word = ids != IMAGE
    assert torch.allclose(prompt[is_word], words(ids)[is_word]), \
        "everything but the image places stays words"
    assert torch.equal(words.weight, before), "the table of words must not be written to"
    assert torch.equal(ids, problem()[0]), "the ids must not be written to"


def check_the_gradients(embed_prompt):
    ids, und, words = problem()
    prompt = embed_prompt(ids, und, words, IMAGE)
    assert prompt.requires_grad, "no gradient comes back from the prompt"
    prompt.sum().backward()
    reached = und.grad is not None and torch.allclose(und.grad, torch.ones_like(und))
    assert reached, "the gradient must reach every understanding embedding, whole"
    at_places = words.weight.grad[IMAGE].abs().sum()
    assert at_places == 0, \
        "no gradient belongs to the row of the image id: its lookup has been replaced"


def check_a_wrong_number(embed_prompt):
    ids, und, words = problem()
    for wrong in (und[:, :2], torch.cat([und, und], dim=1)):
        try:
            embed_prompt(ids, wrong, words, IMAGE)
        except ValueError:
            continue
        except Exception as error:
            name = type(error).__name__
            message = f"too few or too many embeddings are a ValueError, not a {name}"
            raise AssertionError(message) from error
        raise AssertionError(
            "too few or too many embeddings must raise ValueError, and not be cut silently")


def check(embed_prompt):
    """Raises AssertionError, whose message names the mistake, if the answer is wrong."""
    check_where_the_embeddings_are(embed_prompt)
    check_the_words(embed_prompt)
    check_the_gradients(embed_prompt)
    check_a_wrong_number(embed_prompt)
