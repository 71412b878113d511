"""Pretrains the tiny models of this folder: in small, what the published ones were before RecA.

    python tiny/pretrain.py openuni                          writes tiny/openuni/, on one core
    python tiny/pretrain.py openuni --seed 1 --out other     (or harmon, showo, showo-vq, bagel)

Nobody needs to run this: what it makes lies here, and `--model tiny` of the scripts reads it. The
world of pictures in which all this happens (scenes, captions, scores) is section 11 of common.py.

Each model is brought up in the order of its published counterpart: an autoencoder; a language model
that describes; an encoder whose embeddings say words; generation from captions that leave things
out. RecA then finds what the paper finds: a model that can say all it sees, and paints less.
RecA's premise is that an image's embeddings live where words live. Billions of captions make this
true of the real models; here every stage takes its model there by hand.
"""
import argparse
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common
import reca_bagel
import reca_harmon
import reca_openuni
import reca_showo
from common import Rng

# ==== 1. What the stages share ====================================================================

# The words that describe a scene.
WORDS = (*common.SHAPES, *common.COLORS, *common.PLACES)


def generator(*keys):
    """A numpy generator for the keys (seed, stage, position ...)."""
    return np.random.default_rng(keys)


def draw(scenes, size):
    """Scenes -> [B, 3, size, size] in [-1, 1]."""
    return torch.stack([common.to_tensor(common.draw_scene(scene, size)) for scene in scenes])


def crowded(seed, positions, size):
    """Pictures for an autoencoder, [B, 3, size, size] in [-1, 1]: most cells are full, with any
    shape any number of times. (White teaches nothing.)"""
    scenes = []
    for position in positions:
        rng = generator(seed, 1, position)
        full = [place for place in range(4) if rng.random() < 0.7]
        scenes.append([(place, int(rng.integers(4)), int(rng.integers(8))) for place in full])
    return draw(scenes, size)


def scene_words(scene, side, p=1.0, rng=None):
    """What side x side image tokens should say: [side * side, 16], 1 at those WORDS that describe
    what is in the token's cell, 0 where the cell is empty. p: the probability with which a color or
    a place is said (rng needed), as in common.caption."""
    said = torch.zeros(side, side, len(WORDS))
    half = side // 2
    for place, shape, color in scene:
        row = half * (place // 2)
        column = half * (place % 2)
        for word in (shape, 4 + color, 12 + place):
            if word < 4 or p >= 1 or rng.random() < p:
                said[row:row + half, column:column + half, word] = 1
    return said.flatten(0, 1)


def shuffled_caption(scene, rng):
    """A full caption, its objects in any order."""
    return common.caption([scene[i] for i in rng.permutation(len(scene))])


def sparse_caption(scene, rng, p=0.04):
    """What a caption usually tells: every shape and every place, and a color with probability p."""
    objects = []
    for thing in scene:
        color, *others = common.caption([thing]).split()
        objects.append(" ".join([color, *others] if rng.random() < p else others))
    return " and ".join(objects)


def words_in_cell(scene, side, words, nothing, size):
    """What each of side x side places is to tell, a distribution over ids: [side * side, size].
    words: the ids of WORDS; nothing: the id for an empty cell; size: how many ids there are."""
    cells = scene_words(scene, side)  # [side * side, 16]
    empty = (cells.sum(1, keepdim=True) == 0).float()
    cells = torch.cat([cells, empty], dim=1)
    target = torch.zeros(side ** 2, size)
    target[:, [*words, nothing]] = cells / cells.sum(1, keepdim=True)
    return target


def draws_with_text(model, seed, task, examples, positions):
    """The random numbers of a loss, but for one: no text is left out."""
    rng = Rng(seed, "places", positions[0], positions=positions)
    draws = model.draw(task, examples, rng)
    draws["text_dropped"] = torch.zeros(len(examples), dtype=torch.bool)
    return draws


class Stages:
    """The stages of one model: `fraction` of the usual number of steps each (for tests)."""

    def __init__(self, fraction):
        self.fraction = fraction

    def count(self, usual, least):
        return max(least, round(usual * self.fraction))

    def train(self, title, parameters, loss, steps, lr, batch=32, warmup=20):
        """AdamW on loss(positions), with warm-up and a cosine to a tenth. positions: a range, the
        numbers of the batch's examples; no two batches of a stage share one."""
        parameters = list(parameters)
        steps = self.count(steps, least=2)
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

        bar = tqdm(range(steps), desc=title, unit="step", dynamic_ncols=True)
        for step in bar:
            rise = min(1.0, (step + 1) / max(1, min(warmup, steps // 4)))
            fall = 0.55 + 0.45 * math.cos(math.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * rise * fall

            value = loss(range(step * batch, (step + 1) * batch))
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{value.item():.4f}")


def frozen_features(model, samples, task):
    """What the frozen parts say of many samples, a dict each."""
    features = []
    for start in range(0, len(samples), 128):
        features += model.encode(samples[start:start + 128], task)
    return features


# A pool of scenes is gone through in this stride: neighbours come into different batches.
STRIDE = 7919

# ==== 2. Harmon ===================================================================================


def harmon(model, seed, stages):
    """A VAE; a language model that describes images, and answers by place in the buffer tokens,
    behind words and behind images alike; then, with all of that frozen, generation from captions
    that name shapes and places, and seldom a color."""
    c = model.config
    size = c.image_size
    words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
    nothing = model.tokenizer.convert_tokens_to_ids(".")

    # 1. The VAE: reconstruct, also from slightly disturbed latents, so that neighbours of a latent
    # decode alike. Then latents of unit variance.
    def vae_loss(positions):
        pixels = crowded(seed, positions, size)
        latents = model.vae.encode(pixels).latent_dist.mean
        disturbed = latents + 0.05 * torch.randn_like(latents)
        error = model.vae.decode(disturbed).sample - pixels
        return error.square().mean() + error.abs().mean() + 1e-3 * latents.square().mean()

    vae = model.vae.requires_grad_(True)
    stages.train("VAE", vae.parameters(), vae_loss, steps=1200, lr=3e-3, batch=8)
    model.vae.requires_grad_(False)
    with torch.no_grad():
        latents = model.vae.encode(crowded(seed, range(256), size)).latent_dist.mean
    c.vae_scale = 1 / latents.std().item()

    pool = stages.count(3200, least=64)
    scenes = [common.random_scene(generator(seed, 2, i)) for i in range(pool)]
    samples = [{"pixels": pixels} for pixels in draw(scenes, size)]
    features = frozen_features(model, samples, "i2t")

    def examples(positions):
        """(generator, scene, features) of each position; the pool is gone through in STRIDE."""
        for position in positions:
            i = position * STRIDE % pool
            yield generator(seed, 3, position), scenes[i], features[i]

    # 2. Understanding: captions, and tags. An image token is to be near the words (in the language
    # model's own table) for what its cell holds.
    side = math.isqrt(features[0]["latents"][..., 0].numel())

    def understanding_loss(positions):
        batch = list(examples(positions))
        seen = [row for _, _, row in batch]
        talks = [[(common.SEED_TEMPLATE, common.caption(scene))] for _, scene, _ in batch]
        tags = torch.stack([scene_words(scene, side) for _, scene, _ in batch])  # [B, N, 16]

        table = model.llm.model.embed_tokens.weight[words]  # [16, D]
        scale = table.norm(dim=1).mean() ** 2
        near = model.understand(seen)[:, :side ** 2] @ table.T / scale  # [B, N, 16]
        tagging = F.binary_cross_entropy_with_logits(4 * near - 2, tags)
        return model.i2t_loss(seen, talks) + tagging

    # 3. Questions by place: behind either prompt, the buffer tokens, an equal number for each cell,
    # are to say what is there. A model that does not bind a thing to its place lets two things meet
    # in one cell as soon as RecA makes it look at places.
    states = {}

    def remember(_, inputs):
        """What the language model hands to MAR's decoder, the buffer first."""
        states["buffer"] = inputs[0][:, :c.buffer_size]

    def words_in_place(scene):
        """What each buffer token is to tell, a distribution over all ids."""
        target = words_in_cell(scene, 2, words, nothing, len(model.tokenizer))  # [4, ids]
        return target.repeat_interleave(c.buffer_size // 4, dim=0)  # [E, ids]

    def answers_loss(scenes):
        logits = model.llm.lm_head(states["buffer"])  # [B, E, ids]
        targets = torch.stack([words_in_place(scene) for scene in scenes])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))

    def places_loss(positions):
        batch = list(examples(positions))
        half = len(batch) // 2
        seen = [row for _, _, row in batch]
        drawn = [scene for _, scene, _ in batch]
        captions = [shuffled_caption(scene, rng) for rng, scene, _ in batch[:half]]
        asked = [common.templates()[rng.integers(360)] for rng, _, _ in batch[half:]]

        draws = draws_with_text(model, seed, "t2i", seen[:half], positions[:half])
        model.t2i_loss(seen[:half], captions, draws=draws)
        loss = answers_loss(drawn[:half])
        draws = draws_with_text(model, seed, "recon", seen[half:], positions[half:])
        model.recon_loss(seen[half:], asked, draws=draws)
        return loss + answers_loss(drawn[half:]) + understanding_loss(positions[::2])

    trained = [p for group in model.parameter_groups(0.0) for p in group["params"]]
    hook = model.proj_out.register_forward_pre_hook(remember)
    stages.train("understanding", trained, understanding_loss, steps=120, lr=1.5e-3)
    stages.train("places", trained, places_loss, steps=720, lr=1.5e-3, batch=48)
    hook.remove()

    # 4. Generation, and a regression: the decoder's conditions, read by one linear layer, are to
    # tell the latents. Without it a model of this size needs thousands of steps until anything of
    # the prompt arrives at the diffusion head.
    probe = nn.Linear(c.decoder_width, c.latent_channels)
    decode = model.mar.decode
    last = {}

    def decode_and_remember(*inputs):
        last["conditions"] = decode(*inputs)
        return last["conditions"]

    def generation_loss(positions):
        batch = list(examples(positions))
        painted = [row for _, _, row in batch]
        captions = [sparse_caption(scene, rng) for rng, scene, _ in batch]
        generation = model.t2i_loss(painted, captions)
        latents = torch.stack([row["latents"] for row in painted]).flatten(1, 2)  # [B, N, C]
        return generation + F.mse_loss(probe(last["conditions"]), latents)

    model.mar.decode = decode_and_remember
    paints = ("proj_out.", "mar.decoder", "mar.mask_token", "mar.diff")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(paints))
    trained = [p for p in model.parameters() if p.requires_grad]
    stages.train("generation", [*trained, *probe.parameters()], generation_loss, steps=1200,
                 lr=2e-3)
    del model.mar.decode  # the method of the class again


# ==== 3. Show-o ===================================================================================


def showo(model, seed, stages):
    """An image tokenizer; language; CLIP, whose features become the words' own vectors;
    understanding from full captions and generation from sparse ones, with words in the places of
    CLIP's embeddings. The variant without CLIP does without the third."""
    c = model.config
    pool = stages.count(2000, least=64)
    table = model.showo.model.embed_tokens
    texts = common.templates()

    def pick(positions):
        return [position * STRIDE % pool for position in positions]

    # 1. The tokenizer. The toy world has a few dozen kinds of 16 x 16 patches; the number of a kind
    # is its code, which the encoder learns to predict and the decoder to paint. (A real tokenizer
    # invents its codes; that takes longer.) The VQ variant also reads images of half the size.
    def patches(images):
        """[B, 3, S, S] -> [B, N, 768]"""
        return F.unfold(images, 16, stride=16).transpose(1, 2)

    # An empty cell, and one with each shape in each color.
    cells = [[]]
    for shape in range(4):
        for color in range(8):
            cells.append([(0, shape, color)])
    sizes = [c.image_size]
    if not c.w_clip_vit:
        sizes.append(c.image_size // 2)
    drawn_cells = [patches(draw(cells, size)).flatten(0, 1) for size in sizes]
    book = torch.cat(drawn_cells).unique(dim=0)  # [kinds, 768]

    def tokenizer_loss(positions):
        loss = 0
        for size in sizes:
            images = crowded(seed, positions, size)
            distance = torch.cdist(patches(images), book.expand(len(images), -1, -1))
            signs = model.magvit.quantize.embedding[distance.argmin(-1)]  # [B, N, bits]
            signs = signs.transpose(1, 2).unflatten(2, (size // 16,) * 2)
            bits = model.magvit.encoder(images)
            loss = loss + F.binary_cross_entropy_with_logits(bits, (signs > 0).float())
            loss = loss + F.mse_loss(model.magvit.decoder(signs), images)
        return loss

    magvit = model.magvit.requires_grad_(True)
    stages.train("image tokenizer", magvit.parameters(), tokenizer_loss, 400, lr=2e-3, batch=16)
    model.magvit.requires_grad_(False)

    scenes = [common.random_scene(generator(seed, 2, i)) for i in range(pool)]
    pictures = [common.draw_scene(scene, c.image_size) for scene in scenes]
    comma, *known = [model.tokenize(word)[0] for word in (",", *WORDS)]

    def surrounded(text, rng):
        """A caption with gaps in it and sometimes a template behind it: a word means the same
        wherever it is."""
        words = text.split()
        gaps = int(rng.integers(6)) if rng.random() < 0.5 else 0
        for _ in range(gaps):
            words.insert(int(rng.integers(len(words) + 1)), ",")
        if rng.random() < 0.4:
            template = texts[int(rng.integers(len(texts)))]
            words.append(f"<|endoftext|> USER: \n {template} ASSISTANT:")
        return " ".join(words)

    def scene_ids(scene, p=1.0, rng=None):
        """A scene as C words: 4k + 0, 1, 2 are color, shape and place of what is in cell k, color
        and place with probability p."""
        ids = [comma] * c.num_clip
        for place, shape, color in scene:
            for k, word in enumerate((4 + color, shape, 12 + place)):
                if k == 1 or p >= 1 or rng.random() < p:
                    ids[4 * place + k] = known[word]
        return ids

    def fill(prompts, words):
        """Prompts with words in the places that wait for understanding embeddings."""
        waiting = prompts.ids == reca_showo.UND
        ids = prompts.ids.masked_scatter(waiting, torch.tensor(words))
        return dataclasses.replace(prompts, ids=ids)

    def prompt_loss(prompts, shift=False):
        """The cross-entropy of a prompt without understanding embeddings, as in t2i_loss."""
        prompts, targets = model._find_targets(prompts, shift)
        mask = prompts.dense_mask()
        hidden = model.hidden_states(model.embed(prompts), mask, prompts.positions)
        return model._cross_entropy(hidden, targets)

    # 2. Language: a description with its objects in any order and with gaps, then the canonical
    # one. The description stands where a caption stands, or in the places of the embeddings.
    def language_loss(positions):
        drawn = [common.random_scene(generator(seed, 3, position)) for position in positions]
        ids = []
        labels = []
        for scene, position in zip(drawn, positions):
            rng = generator(seed, 4, position)
            mixed = surrounded(shuffled_caption(scene, rng), rng)
            prompt = [c.t2i, *model._between_eot(model.tokenize(mixed))]
            answer = model.tokenize(common.caption(scene)) + [c.eot]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([reca_showo.IGNORED] * len(prompt) + answer))

        padded = pad_sequence(ids, batch_first=True, padding_value=c.pad)
        prompts = reca_showo.PromptBatch.causal(padded.tolist(), c.pad)
        prompts.labels = pad_sequence(labels, batch_first=True, padding_value=reca_showo.IGNORED)
        loss = prompt_loss(prompts, shift=True)
        if not c.w_clip_vit:
            return loss

        half = drawn[::2]
        talks = [[(common.SEED_TEMPLATE, common.caption(scene))] for scene in half]
        talk_ids, talk_labels = model._pad_conversations(talks)
        prompts = model._i2t_batch(talk_ids, talk_labels, [{}] * len(half))
        prompts = fill(prompts, [scene_ids(scene) for scene in half])
        return loss + prompt_loss(prompts, shift=True)

    trained = [p for group in model.parameter_groups(0.0) for p in group["params"]]
    stages.train("language", trained, language_loss, steps=300, lr=2e-3)

    # 3. CLIP and projector learn the words. CLIP sees images with its own statistics, and in RecA
    # with the tokenizer's (see `und_view`).
    def alignment(clip_features, picked):
        """Distance of the projected CLIP features to the vectors of their words, and how well other
        words are told apart. Most are commas, which count less."""
        words = torch.tensor([scene_ids(scenes[i]) for i in picked])  # [B, C]
        choice = torch.tensor([comma, *known])
        target = table(words).detach()
        others = table(choice).detach()
        projected = model.mm_projector(clip_features)
        scale = target.square().mean()

        apart = torch.cdist(projected.flatten(0, 1), others).square()  # [B C, words]
        right = (words.flatten()[:, None] == choice).long().argmax(1)
        weight = torch.where(right == 0, 0.2, 1.0)
        logits = -5 * apart / (scale * c.hidden)
        told_apart = (F.cross_entropy(logits, right, reduction="none") * weight).mean()
        return F.mse_loss(projected, target) / scale + told_apart

    if c.w_clip_vit:
        asked = [model.preprocess(picture, "i2t")["clip_pixels"] for picture in pictures]
        asked = reca_showo.clip_normalize(common.normalize(torch.stack(asked)))
        views = [model.und_view(draw(scenes, c.image_size)), asked]

        def seeing_loss(positions):
            picked = pick(positions)
            seen_by_clip = [model.clip_features(view[picked[k::2]]) for k, view in enumerate(views)]
            return alignment(torch.cat(seen_by_clip), picked[::2] + picked[1::2])

        seeing = [*model.clip.requires_grad_(True).parameters(), *model.mm_projector.parameters()]
        stages.train("CLIP and projector", seeing, seeing_loss, steps=300, lr=2e-3)
        model.clip.requires_grad_(False)

    # 4. Questions by place: behind either prompt, the image tokens after the last layer but one are
    # to tell what is in their cells. A model that does not bind a thing to its place lets two
    # things meet in one cell as soon as RecA makes it look at places.
    def features(task, samples):
        return frozen_features(model, samples, task)

    shown = features("recon", [model.preprocess(picture, "recon") for picture in pictures])
    seen = [features("i2t", [model.preprocess(picture, "i2t") for picture in pictures])]
    if not c.w_clip_vit:
        small = [{"pixels": pixels} for pixels in draw(scenes, c.image_size // 2)]
        seen.append(features("i2t", small))

    side = math.isqrt(c.num_tokens)
    count = len(WORDS) + 1
    answers = nn.Linear(c.hidden, count)
    targets = [words_in_cell(scene, side, range(len(WORDS)), len(WORDS), count) for scene in scenes]
    states = {}

    def remember(_, inputs, output):
        """The image tokens are the last ones of a prompt but for <eoi>."""
        states["image"] = output[:, -c.num_tokens - 1:-1]

    def answers_loss(picked):
        logits = answers(states["image"])  # [B, N, 17]
        wanted = torch.stack([targets[i] for i in picked])
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))

    def describing_loss(positions):
        """Captions of images, and captions of captions."""
        picked = pick(positions)
        one_size = seen[positions[0] // len(positions) % len(seen)]
        talks = [[(common.SEED_TEMPLATE, common.caption(scenes[i]))] for i in picked]
        loss = model.i2t_loss([one_size[i] for i in picked], talks)
        return loss + 0.5 * language_loss(positions)

    def places_loss(positions):
        picked = pick(positions)
        rngs = [generator(seed, 5, position) for position in positions]
        # Captions are harder than images.
        split = len(picked) * 2 // 3

        examples = [shown[i] for i in picked[:split]]
        captions = [surrounded(shuffled_caption(scenes[i], rng), rng)
                    for i, rng in zip(picked[:split], rngs)]
        draws = draws_with_text(model, seed, "t2i", examples, positions[:split])
        model.t2i_loss(examples, captions, draws=draws)
        loss = 2 * answers_loss(picked[:split])

        examples = [shown[i] for i in picked[split:]]
        asked = [texts[int(rng.integers(len(texts)))] for rng in rngs[split:]]
        draws = draws_with_text(model, seed, "recon", examples, positions[split:])
        model.recon_loss(examples, asked, draws=draws)
        loss = loss + answers_loss(picked[split:])
        return loss + describing_loss(positions[:8])

    hook = model.showo.model.layers[-2].register_forward_hook(remember)
    model.train_embeddings_in_recon = True
    stages.train("places", [*trained, *answers.parameters()], places_loss, steps=600, lr=1.5e-3,
                 batch=36)
    model.train_embeddings_in_recon = False
    hook.remove()

    # 5. Generation, in the last layer and the head alone, from captions that name shapes and
    # places, and hardly ever a color.
    def generation_loss(positions):
        picked = pick(positions)
        rngs = [generator(seed, 6, position) for position in positions]
        captions = [surrounded(sparse_caption(scenes[i], rng, p=0.005), rng)
                    for i, rng in zip(picked, rngs)]
        draws = Rng(seed, "toy", positions=positions)
        loss = model.t2i_loss([shown[i] for i in picked], captions, rng=draws)
        return loss + 0.5 * describing_loss(positions[:8])

    last = [model.showo.model.layers[-1], model.showo.model.final_layernorm, model.showo.lm_head]
    for parameter in trained:
        parameter.requires_grad_(False)
    trained = list(nn.ModuleList(last).requires_grad_(True).parameters())
    stages.train("generation", trained, generation_loss, steps=600, lr=2e-3)


# ==== 4. OpenUni ==================================================================================
def openuni(model, seed, stages):
    """An autoencoder; a language model that describes and answers by place; a vision encoder whose
    embeddings say words; then, with all of that frozen, generation from captions that name shapes
    and places, and seldom a color."""
    size = model.config.image_size
    side = math.isqrt(model.image_tokens)
    words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
    empty_word = model.tokenizer.convert_tokens_to_ids(".")
    llm = model.lmm.model.language_model
    table = model.lmm.get_input_embeddings().weight

    def scenes_of(stage, positions):
        """(generator, scene) of each position, the same for the same seed."""
        for position in positions:
            rng = generator(seed, stage, position)
            yield rng, common.random_scene(rng)

    # 1. DC-AE: reconstruct, also from slightly disturbed latents, as the generator will leave some
    # disturbance. Then latents of unit variance, as flow matching wants them.
    def autoencoder_loss(positions):
        pixels = crowded(seed, positions, size)
        latents = model.vae.encode(pixels).latent
        disturbed = latents + 0.1 * torch.randn_like(latents)
        error = model.vae.decode(disturbed).sample - pixels
        return error.square().mean() + error.abs().mean() + 1e-3 * latents.square().mean()

    vae = model.vae.requires_grad_(True)
    stages.train("autoencoder", vae.parameters(), autoencoder_loss, steps=1200, lr=3e-3, batch=8)
    model.vae.requires_grad_(False)
    with torch.no_grad():
        deviation = model.vae.encode(crowded(seed, range(256), size)).latent.std().item()
    model.vae.register_to_config(scaling_factor=1 / deviation)

    # 2. Qwen2: descriptions and answers, from captions in any order and from image tokens that are
    # mixtures of words. And questions by place: behind either prompt, the queries, one for each
    # image token, are to say what is there, in any order. A model that does not bind a thing to its
    # place lets two things meet in one cell as soon as RecA makes it look at places.
    def query_loss(prompts, scenes, und=None):
        """Cross-entropy of what the queries say behind the prompts."""
        ids, mask = model._pad(prompts)
        prompt = model._embed(ids, und)
        queries = model.meta_queries.expand(len(prompts), -1, -1)
        mask = F.pad(mask, (0, queries.shape[1]), value=True)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)

        # In one pass with a graph: here the language model itself is trained.
        output = llm(
            inputs_embeds=torch.cat([prompt, queries], dim=1),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        )
        states = output.last_hidden_state[:, -queries.shape[1]:]
        logits = model.lmm.lm_head(states)                                            # [B, Q, ids]
        count = len(model.tokenizer)
        targets = torch.stack([words_in_cell(scene, side, words, empty_word, count)
                               for scene in scenes])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))

    def conversation_about(scene, question, rng):
        """A description, and an answer about one place."""
        place = int(rng.integers(4))
        answer = "."
        for where, shape, color in scene:
            if where == place:
                answer = f"{list(common.COLORS)[color]} {common.SHAPES[shape]}"
        return [(question, common.caption(scene)), (f"{common.PLACES[place]} ?", answer)]

    def mixtures(drawn):
        """What the image tokens of (generator, scene) say, each token as loud as it likes."""
        und = []
        for rng, scene in drawn:
            loudness = torch.from_numpy(rng.uniform(0.3, 1.2, (side ** 2, len(words))))
            und.append((scene_words(scene, side) * loudness).to(table) @ table[words])
        return torch.stack(und)

    def language_losses(captioned, pictured, caption_share, describing):
        """Answers by place and, where `describing`, also descriptions, of scenes whose captions are
        in the prompt and of scenes whose image tokens are."""
        captions = [shuffled_caption(scene, rng) for rng, scene in captioned]
        templates = [common.templates()[rng.integers(360)] for rng, _ in pictured]
        und = mixtures(pictured)

        caption_prompts = [model.t2i_prompt(caption) for caption in captions]
        image_prompts = [model.recon_prompt(template) for template in templates]
        caption_loss = query_loss(caption_prompts, [scene for _, scene in captioned])
        image_loss = query_loss(image_prompts, [scene for _, scene in pictured], und)
        loss = caption_share * caption_loss + (1 - caption_share) * image_loss
        if not describing:
            return loss

        conversations = []
        for (rng, scene), caption in zip(captioned, captions):
            question = f"Generate an image: {caption}"
            conversations.append(conversation_about(scene, question, rng))
        for (rng, scene), template in zip(pictured, templates):
            conversations.append(conversation_about(scene, template, rng))
        features = [{} for _ in captioned] + [{"und": embeddings} for embeddings in und]
        return loss + 2 * model.i2t_loss(features, conversations)

    def language_loss(positions):
        drawn = list(scenes_of(2, positions))
        return language_losses(drawn[::2], drawn[1::2], caption_share=0.5, describing=True)

    def binding_loss(positions):
        """Places above all, of captions above all: they are harder than images. Without a
        description now and then the model would forget how to give one."""
        drawn = list(scenes_of(12, positions))
        captioned = drawn[:len(drawn) * 3 // 4]
        pictured = drawn[len(captioned):]
        every_third = positions[0] // len(positions) % 3 == 0
        return language_losses(captioned, pictured, caption_share=0.75, describing=every_third)

    language = nn.ModuleList([llm, model.lmm.lm_head]).requires_grad_(True)
    trained = [*language.parameters(), model.meta_queries]
    stages.train("language", trained, language_loss, steps=700, lr=1.5e-3, batch=16)
    stages.train("places", trained, binding_loss, steps=450, lr=1.5e-3, batch=24)
    model.lmm.requires_grad_(False)

    # 3. InternViT and the first half of mlp1. The second half is set to the words' embeddings, one
    # word a hidden number: an image token is then a mixture of words.
    projector = model.lmm.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_2.weight.zero_()[:, :len(words)] = table[words].T
        projector.linear_2.bias.zero_()
    hidden = {}

    def remember(_, inputs, output):
        hidden["before"] = inputs[0][..., :len(words)]
        hidden["after"] = output[..., :len(words)]

    def vision_loss(positions):
        scenes = [scene for _, scene in scenes_of(3, positions)]
        model.lmm.model.get_image_features(model._vit_input(draw(scenes, size)))
        targets = torch.stack([scene_words(scene, side) for scene in scenes])
        # The squared error alone loses words: GELU is flat where one was never said, which leaves
        # it no gradient.
        square = F.mse_loss(hidden["after"], targets)
        return square + F.binary_cross_entropy_with_logits(hidden["before"], targets)

    hook = projector.act.register_forward_hook(remember)
    eyes = nn.ModuleList([model.lmm.model.vision_tower, projector.layer_norm, projector.linear_1])
    eyes.requires_grad_(True)
    stages.train("vision", eyes.parameters(), vision_loss, steps=400, lr=2e-3)
    model.lmm.requires_grad_(False)
    hook.remove()

    # 4. Queries, connector, projector and SANA: text to image, from captions that always name shape
    # and place, and one color in twenty-five.
    def generation_loss(positions):
        drawn = list(scenes_of(4, positions))
        pixels = draw([scene for _, scene in drawn], size)
        features = [{"latents": latents} for latents in model._latents(pixels)]
        captions = [sparse_caption(scene, rng) for rng, scene in drawn]
        return model.t2i_loss(features, captions)

    trained = [p for group in model.parameter_groups(0.0) for p in group["params"]]
    stages.train("generation", trained, generation_loss, steps=800, lr=1.5e-3)


# ==== 5. BAGEL ====================================================================================

def bagel(model, seed, stages):
    """An autoencoder; an understanding expert that reads and describes; a ViT whose embeddings are
    those of words; a generation expert that begins as a copy of the other (as BAGEL's did) and
    learns from sparse captions."""
    c = model.config
    size = c.image_size
    pool = stages.count(2048, least=64)
    table = model.language_model["model"]["embed_tokens"].weight
    words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
    side = c.vit["image_size"] // c.vit["patch_size"]

    # 1. The autoencoder, first on quarters of pictures (one cell, little work), then on whole ones,
    # since its norms see the whole picture. The posterior's deviation is set, not learned:
    # exp(-6 / 2) = 0.05.
    spread = model.vae.encoder.conv_out
    with torch.no_grad():
        spread.weight[c.vae_z_channels:] = 0
        spread.bias[c.vae_z_channels:] = -6

    def autoencode(pixels):
        mean = model.vae.encode(pixels).latent_dist.mean
        disturbed = mean + 0.05 * torch.randn_like(mean)
        decoded = model.vae.decode(disturbed).sample
        error = F.mse_loss(decoded, pixels) + F.l1_loss(decoded, pixels)
        return error + 1e-3 * mean.square().mean()

    def quarters(positions):
        pixels = crowded(seed, positions, size)
        pixels = pixels.unflatten(2, (2, -1)).unflatten(4, (2, -1))  # [B, 3, 2, S/2, 2, S/2]
        row = positions[0] // 16 % 2
        column = positions[0] // 32 % 2
        return autoencode(pixels[:, :, row, :, column])

    def wholes(positions):
        return autoencode(crowded(seed, positions, size))

    vae = list(model.vae.requires_grad_(True).parameters())
    stages.train("autoencoder, quarters", vae, quarters, steps=300, lr=2e-3, batch=16)
    stages.train("autoencoder", vae, wholes, steps=200, lr=1e-3, batch=4)

    # The latents that RecA sees have mean 0 and deviation 1.
    scenes = [common.random_scene(generator(seed, 2, i)) for i in range(pool)]
    pictures = [model.preprocess(common.draw_scene(scene, size), "recon") for scene in scenes]
    features = frozen_features(model, [{"vae": picture["vae"]} for picture in pictures], "t2i")
    means = torch.stack([image["mean"] for image in features[:512]])
    c.vae_scale_factor = 1 / means.std().item()
    c.vae_shift_factor = means.mean().item()

    # 2. Language: the understanding expert describes what stands in the places of the patches,
    # mixtures of words, and repeats captions whose objects come in any order. Until the end of
    # stage 4 an image's "vit" is [side, side, 16], the weight of each word in each place, and
    # understand() makes a mixture of the words' embeddings of it.
    def mix_words(features):
        weights = torch.stack([image["vit"] for image in features])  # [B, side, side, 16]
        return (weights @ table[words]).flatten(1, 2) + model.vit_pos_embed(side, side)

    def language(positions):
        features = []
        conversations = []
        for k, position in enumerate(positions):
            rng = generator(seed, 3, position)
            scene = common.random_scene(generator(seed, 4, position))
            if k % 2:
                loudness = rng.uniform(0.3, 1.2, (side ** 2, len(WORDS)))
                weights = scene_words(scene, side) * torch.from_numpy(loudness).float()
                features.append({"vit": weights.unflatten(0, (side, side))})
                question = common.templates()[rng.integers(360)]
            else:
                features.append({})
                question = shuffled_caption(scene, rng)
            conversations.append([(question, common.caption(scene))])
        return model.i2t_loss(features, conversations)

    model.freeze(train_und=True)
    model.understand = mix_words
    named = model.language_model.named_parameters()
    understanding = [p for name, p in named if "_moe_gen" not in name]
    stages.train("language", understanding, language, steps=1000, lr=1e-3)
    model.freeze()

    # 3. The ViT and the first half of the connector learn the words' weights. The second half is
    # set: each hidden number stands for a word, and adds that word's embedding.
    fc1, fc2 = model.connector.values()
    with torch.no_grad():
        fc2.weight.zero_()[:, :len(words)] = table[words].T
        fc2.bias.zero_()

    def vision(positions):
        picked = [position % pool for position in positions]
        pixels = common.normalize(torch.stack([pictures[i]["vit"] for i in picked]))
        hidden = fc1(model._vit(pixels).flatten(1, 2))[..., :len(words)]  # [B, M, 16]
        target = torch.stack([scene_words(scenes[i], side) for i in picked])
        # The squared error alone loses words: GELU is flat where a word has become improbable, and
        # gives it no gradient any more.
        square = F.mse_loss(F.gelu(hidden, approximate="tanh"), target)
        return square + F.binary_cross_entropy_with_logits(hidden, target)

    encoder = nn.ModuleList([model.vit_model, fc1]).requires_grad_(True)
    stages.train("vision", encoder.parameters(), vision, steps=600, lr=2e-3)

    # 4. The generation expert, started as a copy of the other. Questions by place: behind words and
    # behind images, the latent tokens after the last layer but one are to tell what is in their
    # cells. A model that does not bind a thing to its place lets two things meet in one cell as
    # soon as RecA makes it look at places. And generation, from captions that name shapes and
    # places, and hardly ever a color.
    del model.understand  # the method of the class again
    model.freeze()
    state = model.state_dict()
    model.load_state_dict({name: state[name.replace("_moe_gen", "")] for name in state})

    shown = frozen_features(model, pictures, "recon")
    height, width, _ = model._grid(shown[0]["mean"])
    count = len(WORDS) + 1
    answers = nn.Linear(table.shape[1], count)
    targets = [words_in_cell(scene, height, range(len(WORDS)), len(WORDS), count)
               for scene in scenes]
    states = {}

    def remember(_, inputs, output):
        states["latents"] = output[1]  # [B * N, D]

    def answers_loss(picked, texts):
        """Images whose texts have one length stand together, those of the first length first."""
        groups = {}
        for i, text in zip(picked, texts):
            groups.setdefault(len(model.tokenize(text)), []).append(targets[i])
        wanted = torch.cat([target for group in groups.values() for target in group])
        return F.cross_entropy(answers(states["latents"]), wanted)

    def noisy_draws(task, examples, positions):
        """Little of the image is left in the noise."""
        draws = draws_with_text(model, seed, task, examples, positions)
        draws["timestep_normal"] = draws["timestep_normal"] + 2.5
        return draws

    def places_and_generation(positions):
        picked = [position * STRIDE % pool for position in positions]
        rngs = [generator(seed, 5, position) for position in positions]
        third = len(picked) // 3

        # Questions behind captions.
        read = picked[:third]
        captions = [shuffled_caption(scenes[i], rng) for i, rng in zip(read, rngs)]
        examples = [features[i] for i in read]
        model.t2i_loss(examples, captions, draws=noisy_draws("t2i", examples, positions[:third]))
        loss = answers_loss(read, captions)

        # Questions behind images.
        seen = picked[third:2 * third]
        asked = [common.templates()[rng.integers(360)] for rng in rngs[third:2 * third]]
        examples = [shown[i] for i in seen]
        draws = noisy_draws("recon", examples, positions[third:2 * third])
        model.recon_loss(examples, asked, draws=draws)
        loss = loss + answers_loss(seen, asked)

        # Generation.
        painted = picked[2 * third:]
        captions = [sparse_caption(scenes[i], rng, p=0.005)
                    for i, rng in zip(painted, rngs[2 * third:])]
        rng = Rng(seed, "toy t2i", positions=positions[2 * third:])
        return loss + model.t2i_loss([features[i] for i in painted], captions, rng=rng)

    hook = model.blocks()[-2].register_forward_hook(remember)
    trained = [p for p in model.parameters() if p.requires_grad]
    stages.train("places and generation", [*trained, *answers.parameters()], places_and_generation,
                 steps=1000, lr=2e-3, batch=48)
    hook.remove()


# ==== 6. Files and the command line ===============================================================

# Folder -> class, its name for these sizes, and how it is pretrained.
MODELS = {
    "harmon": (reca_harmon.Harmon, "tiny", harmon),
    "showo": (reca_showo.Showo, "tiny", showo),
    "showo-vq": (reca_showo.Showo, "tiny-vq", showo),
    "openuni": (reca_openuni.OpenUni, "tiny", openuni),
    "bagel": (reca_bagel.Bagel, "tiny", bagel),
}


def halve(values):
    """A state dict or a wrapper around one -> the same with its float32 tensors in float16."""
    if isinstance(values, dict):
        return {key: halve(value) for key, value in values.items()}
    return values.half() if values.dtype == torch.float32 else values


def store_in_16_bits(folder):
    """Rewrites the weight files of a saved model in float16: half the size."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            save_file(halve(load_file(path)), path, {"format": "pt"})
        elif path.suffix in (".pth", ".ckpt"):
            state = halve(torch.load(path, weights_only=True))
            with open(path, "wb") as stream:
                torch.save(state, stream)


def pretrain(name, folder, seed=0, fraction=1.0):
    """Pretrains the model `name` and saves it in `folder`, in the released layout, in 16 bits."""
    model_class, size, bring_up = MODELS[name]
    torch.manual_seed(seed)
    model = model_class.random(size)
    model.train()
    bring_up(model, seed, Stages(fraction))

    with common.atomic(folder) as temporary:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        store_in_16_bits(temporary)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the usual steps, to try it")
    parser.add_argument("--out", type=Path, help="default: the folder beside this file")
    args = parser.parse_args()

    # The sums of one thread: with more, the same seed gives another model.
    torch.set_num_threads(1)
    folder = args.out or HERE / args.name
    pretrain(args.name, folder, args.seed, args.fraction)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    print(f"{folder}: {sum(sizes)} bytes")


if __name__ == "__main__":
    common.cli(main)
