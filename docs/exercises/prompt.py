"""Exercise 2: the prompt with understanding embeddings in it, of equation (2).

A language model does not read ids but embeddings: each id is looked up in a table. RecA uses this.
It writes the prompt with which the model describes images (appendix C.1 of the paper):

    <|im_start|>user <img> * * * * </img> Describe the image in detail.<|im_end|> ... assistant

The places * have an id of their own that stands for no word. After the lookup, what stands in these
places is replaced by the understanding embeddings of an image: the first place gets the first
embedding, and so on, as many as there are. The rest of the prompt stays words. For the language
model both are vectors of the same width, and this is why an image can stand where a caption would.

The prompts of a batch have templates of different lengths, so that their image places need not be
at the same positions. Gradients must reach the embeddings: in Harmon the understanding side is
trained through this very path.

Run this file to check your answer. Our own: `_embed` in reca_openuni.py, section 4.
"""


def embed_prompt(ids, und, words, image_id):
    """ids [B, L] and understanding embeddings [B, N, D] -> the prompt's embeddings [B, L, D].

    ids       int64 [B, L]; each row has the id `image_id` in N places
    und       float [B, N, D]: row b belongs in the image places of ids[b], in order
    words     nn.Embedding: words(ids) is [..., D]
    image_id  int

    Raises ValueError if the ids have more or fewer image places than there are embeddings.
    """
    raise NotImplementedError("fill in embed_prompt, then run this file again")


if __name__ == "__main__":
    from check_prompt import check
    check(embed_prompt)
    print("right")
