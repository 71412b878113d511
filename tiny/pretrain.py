"""Pretrains the tiny models of this folder: in small, what the published ones were before RecA.

    python tiny/pretrain.py openuni                          writes tiny/openuni/, on one core
    python tiny/pretrain.py openuni --seed 1 --out other     (or harmon, showo, showo-vq, bagel)

Nobody needs to run this: what it makes lies here, and `--model tiny` of the scripts reads it. The
world of pictures in which all this happens (scenes, captions, scores) is section 7 of common.py.

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
    """A VAE; understanding from full captions; with it, generation from sparse ones."""
    c = model.config
    pool = stages.count(4000, least=64)

    def vae_loss(positions):
        pixels = crowded(seed, positions, c.image_size)
        latents = model.vae.encode(pixels).latent_dist.mean
        # Neighbours of a latent are to decode alike.
        disturbed = latents + 0.05 * torch.randn_like(latents)
        error = model.vae.decode(disturbed).sample - pixels
        return error.square().mean() + error.abs().mean() + 1e-3 * latents.square().mean()

    vae = model.vae.requires_grad_(True)
    stages.train("VAE", vae.parameters(), vae_loss, steps=600, lr=2e-3, batch=8)
    model.vae.requires_grad_(False)
    with torch.no_grad():
        latents = model.vae.encode(crowded(seed, range(256), c.image_size)).latent_dist.mean
    c.vae_scale = 1 / latents.std().item()

    scenes = [common.random_scene(generator(seed, 2, i)) for i in range(pool)]
    samples = [{"pixels": pixels} for pixels in draw(scenes, c.image_size)]
    features = frozen_features(model, samples, "i2t")

    def pick(positions):
        return [position * STRIDE % pool for position in positions]

    # Understanding: captions, and tags. An image token is to be near the words (in the language
    # model's own table) for what its cell holds.
    words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
    tags = torch.stack([scene_words(scene, 4) for scene in scenes])                 # [pool, N, 16]

    def understanding(positions):
        picked = pick(positions)
        seen = [features[i] for i in picked]
        talks = [[(common.SEED_TEMPLATE, common.caption(scenes[i]))] for i in picked]
        table = model.llm.model.embed_tokens.weight[words]                                # [16, D]
        scale = table.norm(dim=1).mean() ** 2
        near = model.understand(seen)[:, :16] @ table.T / scale                        # [B, N, 16]
        tagging = F.binary_cross_entropy_with_logits(4 * near - 2, tags[picked])
        return model.i2t_loss(seen, talks) + tagging

    # Generation, and a regression: the decoder's conditions, read by one linear layer, are to tell
    # the latents. Without it a model of this size needs thousands of steps until anything of the
    # prompt arrives at the diffusion head.
    probe = nn.Linear(c.decoder_width, c.latent_channels)
    decode = model.mar.decode
    last = {}

    def decode_and_remember(*inputs):
        last.setdefault("conditions", decode(*inputs))
        return last["conditions"]

    def both(positions):
        last.clear()
        picked = pick(position + 5 for position in positions)
        rng = generator(seed, 3, positions[0])
        captions = [common.caption(scenes[i], 0.3, rng) for i in picked]
        painted = [features[i] for i in picked]
        generation = model.t2i_loss(painted, captions)
        latents = torch.stack([row["latents"] for row in painted]).flatten(1, 2)        # [B, N, C]
        regression = F.mse_loss(probe(last["conditions"]), latents)
        return understanding(positions) + generation + regression

    trained = [p for group in model.parameter_groups(0.0) for p in group["params"]]
    stages.train("understanding", trained, understanding, steps=150, lr=1.5e-3)
    model.mar.decode = decode_and_remember
    trained += probe.parameters()
    stages.train("understanding and generation", trained, both, steps=700, lr=2e-3)
    del model.mar.decode                                          # the method of the class again


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

    # 4. Understanding from full captions, generation from sparse ones, some of them in the places
    # of the understanding embeddings.
    def features(task, samples):
        return frozen_features(model, samples, task)

    painted = features("t2i", [model.preprocess(picture, "t2i") for picture in pictures])
    seen = [features("i2t", [model.preprocess(picture, "i2t") for picture in pictures])]
    if not c.w_clip_vit:
        small = [{"pixels": pixels} for pixels in draw(scenes, c.image_size // 2)]
        seen.append(features("i2t", small))

    def joint_loss(positions):
        picked = pick(positions)
        rngs = [generator(seed, 5, position) for position in positions]
        captions = [surrounded(common.caption(scenes[i], 0.15, rng), rng)
                    for i, rng in zip(picked, rngs)]
        draws = Rng(seed, "toy", positions=positions)
        loss = model.t2i_loss([painted[i] for i in picked], captions, rng=draws)

        third = picked[:max(1, len(picked) // 3)]
        one_size = seen[positions[0] // len(positions) % len(seen)]
        understood = [one_size[i] for i in third]
        talks = [[(common.SEED_TEMPLATE, common.caption(scenes[i]))] for i in third]
        loss = loss + model.i2t_loss(understood, talks)
        loss = loss + 0.5 * language_loss(positions[:8])
        if not c.w_clip_vit:
            return loss

        targets = [painted[i] for i in third]
        in_place_rng = Rng(seed, "toy in place", positions=positions[:len(third)])
        draws = model.draw("recon", targets, in_place_rng)
        tokens, labels = model._mask_tokens(targets, draws)
        words = [scene_ids(scenes[i], 0.15, rng) for i, rng in zip(third, rngs)]
        asked = [texts[int(rng.integers(len(texts)))] for rng in rngs[:len(third)]]
        prompts = fill(model._recon_batch(asked, targets, tokens, labels), words)
        clip_features = torch.stack([feature["und"] for feature in understood])
        return loss + prompt_loss(prompts) + alignment(clip_features, third)

    stages.train("understanding and generation", trained, joint_loss, steps=700, lr=2e-3)


# ==== 4. OpenUni ==================================================================================
def openuni(model, seed, stages):
    """An autoencoder; a language model that describes and answers by place; a vision encoder whose
    embeddings say words; then, with all of that frozen, generation from captions that name shapes
    and places, and seldom a color."""
    size = model.config.image_size
    side = math.isqrt(model.image_tokens)
    words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
    nothing = model.tokenizer.convert_tokens_to_ids(".")
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
    def words_in_place(scene):
        """What the queries are to say: a distribution over all ids each, [Q, ids]."""
        said = scene_words(scene, side)
        said = torch.cat([said, (said.sum(1, keepdim=True) == 0).float()], dim=1)
        target = torch.zeros(side ** 2, len(model.tokenizer))
        target[:, [*words, nothing]] = said / said.sum(1, keepdim=True)
        return target

    def query_loss(prompts, scenes, und=None):
        ids, mask = model._pad(prompts)
        prompt = model._embed(ids, und)
        queries = model.meta_queries.expand(len(prompts), -1, -1)
        mask = F.pad(mask, (0, queries.shape[1]), value=True)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        states = llm(inputs_embeds=torch.cat([prompt, queries], dim=1), attention_mask=mask,
                     position_ids=positions, use_cache=False).last_hidden_state
        logits = model.lmm.lm_head(states[:, -queries.shape[1]:])                     # [B, Q, ids]
        targets = torch.stack([words_in_place(scene) for scene in scenes])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))

    def talk(scene, first, rng):
        """A description, and an answer about one place."""
        place = int(rng.integers(4))
        there = [f"{list(common.COLORS)[color]} {common.SHAPES[shape]}"
                 for where, shape, color in scene if where == place]
        answer = there[0] if there else "."
        return [(first, common.caption(scene)), (f"{common.PLACES[place]} ?", answer)]

    def mixtures(drawn):
        """What the image tokens of (generator, scene) say, each token as loud as it likes."""
        und = []
        for rng, scene in drawn:
            loudness = torch.from_numpy(rng.uniform(0.3, 1.2, (side ** 2, len(words))))
            und.append((scene_words(scene, side) * loudness).to(table) @ table[words])
        return torch.stack(und)

    def both(read, seen, caption_share, talking):
        """Answers by place and, where talking, also descriptions, of scenes that are read and of
        scenes that are seen."""
        captions = [shuffled_caption(scene, rng) for rng, scene in read]
        asked = [common.templates()[rng.integers(360)] for rng, _ in seen]
        und = mixtures(seen)
        in_words = [model.t2i_prompt(caption) for caption in captions]
        in_images = [model.recon_prompt(template) for template in asked]
        loss = caption_share * query_loss(in_words, [scene for _, scene in read])
        loss = loss + (1 - caption_share) * query_loss(in_images, [scene for _, scene in seen], und)
        if not talking:
            return loss

        talks = [talk(scene, f"Generate an image: {caption}", rng)
                 for (rng, scene), caption in zip(read, captions)]
        talks += [talk(scene, template, rng) for (rng, scene), template in zip(seen, asked)]
        features = [{} for _ in read] + [{"und": row} for row in und]
        return loss + 2 * model.i2t_loss(features, talks)

    def language_loss(positions):
        drawn = list(scenes_of(2, positions))
        return both(drawn[::2], drawn[1::2], caption_share=0.5, talking=True)

    def binding_loss(positions):
        """Places above all, of captions above all: they are harder than images. Without a
        description now and then the model would forget how to give one."""
        drawn = list(scenes_of(12, positions))
        read = drawn[:len(drawn) * 3 // 4]
        seen = drawn[len(read):]
        third = positions[0] // len(positions) % 3 == 0
        return both(read, seen, caption_share=0.75, talking=third)

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
    gates = {}

    def remember(_, inputs, output):
        gates["inner"] = inputs[0][..., :len(words)]
        gates["said"] = output[..., :len(words)]

    def vision_loss(positions):
        drawn = [scene for _, scene in scenes_of(3, positions)]
        model.lmm.model.get_image_features(model._vit_input(draw(drawn, size)))
        right = torch.stack([scene_words(scene, side) for scene in drawn])
        # The squared error alone loses words: GELU is flat where one was never said, which leaves
        # it no gradient.
        square = F.mse_loss(gates["said"], right)
        return square + F.binary_cross_entropy_with_logits(gates["inner"], right)

    hook = projector.act.register_forward_hook(remember)
    eyes = nn.ModuleList([model.lmm.model.vision_tower, projector.layer_norm, projector.linear_1])
    eyes.requires_grad_(True)
    stages.train("vision", eyes.parameters(), vision_loss, steps=400, lr=2e-3)
    model.lmm.requires_grad_(False)
    hook.remove()

    # 4. Queries, connector, projector and SANA: text to image, from captions that always name shape
    # and place, and one color in twenty-five.
    def sparse_caption(scene, rng):
        said = []
        for thing in scene:
            words = common.caption([thing]).split()
            said.append(" ".join(words if rng.random() < 0.04 else words[1:]))
        return " and ".join(said)

    def generation_loss(positions):
        drawn = list(scenes_of(4, positions))
        pixels = draw([scene for _, scene in drawn], size)
        features = [{"latents": latents} for latents in model._latents(pixels)]
        return model.t2i_loss(features, [sparse_caption(scene, rng) for rng, scene in drawn])

    trained = [p for group in model.parameter_groups(0.0) for p in group["params"]]
    stages.train("generation", trained, generation_loss, steps=800, lr=1.5e-3)


# ==== 5. BAGEL ====================================================================================

def bagel(model, seed, stages):
    """An autoencoder; an understanding expert that reads and describes; a ViT whose embeddings are
    words; a generation expert, started as a copy of the other (as BAGEL's was) and brought up on
    sparse captions."""
    c = model.config
    size = c.image_size
    pool = stages.count(2048, least=64)
    table = model.language_model["model"]["embed_tokens"].weight
    words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
    side = c.vit["image_size"] // c.vit["patch_size"]

    # 1. The autoencoder, first on quarters of pictures (one cell, little work), then on whole ones:
    # its norms see all. The posterior's spread is set, not learnt: exp(-6 / 2) = 0.05.
    spread = model.vae.encoder.conv_out
    with torch.no_grad():
        spread.weight[c.vae_z_channels:] = 0
        spread.bias[c.vae_z_channels:] = -6

    def autoencode(pixels):
        mean = model.vae.encode(pixels).latent_dist.mean
        disturbed = mean + 0.05 * torch.randn_like(mean)
        back = model.vae.decode(disturbed).sample
        return F.mse_loss(back, pixels) + F.l1_loss(back, pixels) + 1e-3 * mean.square().mean()

    def quarters(positions):
        pixels = crowded(seed, positions, size)
        pixels = pixels.unflatten(2, (2, -1)).unflatten(4, (2, -1))       # [B, 3, 2, S/2, 2, S/2]
        row = positions[0] // 16 % 2
        column = positions[0] // 32 % 2
        return autoencode(pixels[:, :, row, :, column])

    def wholes(positions):
        return autoencode(crowded(seed, positions, size))

    vae = list(model.vae.requires_grad_(True).parameters())
    stages.train("autoencoder, quarters", vae, quarters, steps=300, lr=2e-3, batch=16)
    stages.train("autoencoder", vae, wholes, steps=200, lr=1e-3, batch=4)

    scenes = [common.random_scene(generator(seed, 2, i)) for i in range(pool)]
    pictures = [model.preprocess(common.draw_scene(scene, size), "recon") for scene in scenes]
    features = frozen_features(model, [{"vae": picture["vae"]} for picture in pictures], "t2i")
    means = torch.stack([row["mean"] for row in features[:512]])
    c.vae_scale_factor = 1 / means.std().item()
    c.vae_shift_factor = means.mean().item()

    # 2. Language: descriptions of what the places of the patches say, which are mixtures of words,
    # and of captions in any order. From here on, a picture's "vit" is [side, side, 16], how loud
    # each word is.
    def mixed(said):
        return (said @ table[words]).flatten(1, 2) + model.vit_pos_embed(side, side)

    def language(positions):
        seen = []
        talks = []
        for k, position in enumerate(positions):
            rng = generator(seed, 3, position)
            scene = common.random_scene(generator(seed, 4, position))
            if k % 2:
                loudness = torch.from_numpy(rng.uniform(0.3, 1.2, (side ** 2, len(WORDS)))).float()
                said = scene_words(scene, side) * loudness
                seen.append({"vit": said.unflatten(0, (side, side))})
                asked = common.templates()[rng.integers(360)]
            else:
                seen.append({})
                asked = shuffled_caption(scene, rng)
            talks.append([(asked, common.caption(scene))])
        return model.i2t_loss(seen, talks)

    model.freeze(train_und=True)
    model._embed_vit = mixed
    named = model.language_model.named_parameters()
    understanding = [p for name, p in named if "_moe_gen" not in name]
    stages.train("language", understanding, language, steps=1000, lr=1e-3)
    model.freeze()

    # 3. ViT and the first half of the connector; the second half is set to the words' embeddings,
    # one word a hidden number.
    first, second = model.connector.values()
    with torch.no_grad():
        second.weight.zero_()[:, :len(words)] = table[words].T
        second.bias.zero_()

    def see(positions):
        picked = [position % pool for position in positions]
        shown = common.normalize(torch.stack([pictures[i]["vit"] for i in picked]))
        inner = first(model._vit(shown).flatten(1, 2))[..., :len(words)]              # [B, M, 16]
        said = torch.stack([scene_words(scenes[i], side) for i in picked])
        # The squared error alone loses words: GELU is flat where one was never said, which leaves
        # it no gradient.
        square = F.mse_loss(F.gelu(inner, approximate="tanh"), said)
        return square + F.binary_cross_entropy_with_logits(inner, said)

    eyes = nn.ModuleList([model.vit_model, first]).requires_grad_(True)
    stages.train("vision", eyes.parameters(), see, steps=600, lr=2e-3)

    # 4. Generation from sparse captions, some of them said in the places of the patches.
    model.freeze()
    own = model.state_dict()
    model.load_state_dict({name: own[name.replace("_moe_gen", "")] for name in own})

    def paint(positions):
        picked = [position * STRIDE % pool for position in positions]
        few = len(positions) // 4
        captions = [common.caption(scenes[i], 0.15, generator(seed, 5, position))
                    for i, position in zip(picked, positions)]
        draws = Rng(seed, "toy t2i", positions=positions)
        loss = model.t2i_loss([features[i] for i in picked], captions, rng=draws)

        shown = []
        for i, position in zip(picked[:few], positions):
            said = scene_words(scenes[i], side, 0.15, generator(seed, 6, position))
            shown.append({**features[i], "vit": said.unflatten(0, (side, side))})
        draws = Rng(seed, "toy in place", positions=positions[:few])
        return loss + model.recon_loss(shown, [common.SEED_TEMPLATE] * few, rng=draws)

    trained = [p for p in model.parameters() if p.requires_grad]
    stages.train("generation", trained, paint, steps=800, lr=2e-3)
    del model._embed_vit                                          # the method of the class again


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
