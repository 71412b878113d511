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

Sections 1 and 2 hold what the models share. Sections 3 to 6 are a class for each model: its `run`
names the stages in their order, and each stage `train_...` has its loss beside it.
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

# ==== 1. Pictures, words and captions =============================================================

# The words that describe a scene.
WORDS = (*common.SHAPES, *common.COLORS, *common.PLACES)

# What can be in a cell, where a model answers in a list of its own: one of WORDS, or nothing.
ANSWERS = len(WORDS) + 1

# A pool of scenes is gone through in this stride: neighbours come into different batches.
STRIDE = 7919


def generator(*keys):
    """A numpy generator for the keys (seed, stage, position ...)."""
    return np.random.default_rng(keys)


def draw(scenes, size):
    """Scenes -> [B, 3, size, size] in [-1, 1]."""
    return torch.stack([common.to_tensor(common.draw_scene(scene, size)) for scene in scenes])


def scene_words(scene, side):
    """What side x side image tokens should say -> [side*side, 16], 1 at those WORDS that describe
    what is in the token's cell, 0 where the cell is empty."""
    said = torch.zeros(side, side, len(WORDS))  # [side, side, 16]
    half = side // 2
    for place, shape, color in scene:
        row = half * (place // 2)
        column = half * (place % 2)
        for word in (shape, 4 + color, 12 + place):
            said[row:row + half, column:column + half, word] = 1
    return said.flatten(0, 1)  # [side*side, 16]


def loud_words(scene, side, rng):
    """scene_words, each word of each token as loud as it likes -> [side*side, 16]. What an encoder
    will say of an image is not exactly 1 and 0 either."""
    loudness = rng.uniform(0.3, 1.2, (side ** 2, len(WORDS)))
    return scene_words(scene, side) * torch.from_numpy(loudness).float()


def words_in_cell(scene, side, words, nothing, size):
    """What each of side x side places is to tell, a distribution over ids -> [side*side, size].
    words: the ids of WORDS; nothing: the id for an empty cell; size: how many ids there are."""
    cells = scene_words(scene, side)  # [side*side, 16]
    empty = (cells.sum(1, keepdim=True) == 0).float()  # [side*side, 1]
    cells = torch.cat([cells, empty], dim=1)  # [side*side, 17]
    target = torch.zeros(side ** 2, size)  # [side*side, size]
    target[:, [*words, nothing]] = cells / cells.sum(1, keepdim=True)
    return target


def answers_in_cell(scene, side):
    """words_in_cell where a model answers in a list of its own -> [side*side, 17]. The last of
    these ANSWERS is that nothing is there."""
    return words_in_cell(scene, side, range(len(WORDS)), len(WORDS), ANSWERS)


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


def any_template(rng):
    """One of RecA's instructions."""
    texts = common.templates()
    return texts[rng.integers(len(texts))]


def description(scene):
    """The conversation, of one turn, in which a scene is described in full."""
    return [(common.SEED_TEMPLATE, common.caption(scene))]


# ==== 2. What the stages share ====================================================================
#
# Three things come back in several models.
#
# *Questions by place.* What the generator gets from the language model must tell which thing stands
# in which cell, behind a caption and behind an image alike. A model that does not bind a thing to
# its place lets two things meet in one cell as soon as RecA makes it look at places.
#
# *Words in a projector.* Where an encoder's embeddings go through two linear layers, the second is
# set to the words' embeddings, one word a hidden number, and the first learns how much of each word
# is in an image token (`set_to_words`, `word_loss`). A token is then a mixture of words.
#
# *Sparse captions.* Generation learns from captions that name every shape and place, and hardly
# ever a color (`sparse_caption`), while what lies before it is frozen. (In BAGEL it goes on
# learning.)


def autoencoder_loss(decoded, pixels, latents):
    """How far a decoded picture is from the original. The last term keeps the latents small: if
    they grew, the noise that they are disturbed with would be nothing beside them."""
    error = decoded - pixels
    return error.square().mean() + error.abs().mean() + 1e-3 * latents.square().mean()


@torch.no_grad()
def set_to_words(linear, embeddings):
    """Sets the second layer of a projector: each of its first 16 inputs adds the embedding of one
    word, and all else, the bias included, is 0. embeddings [16, D]: those of WORDS."""
    linear.weight.zero_()[:, :len(WORDS)] = embeddings.T
    linear.bias.zero_()


def word_loss(before, after, targets):
    """How well hidden numbers say words, [B, N, 16] each: before and after their GELU, and what
    they should be after it. The squared error alone loses words: GELU is flat where one was never
    said or has become improbable, which leaves it no gradient."""
    square = F.mse_loss(after, targets)
    return square + F.binary_cross_entropy_with_logits(before, targets)


def trained_by_reca(model):
    """The parameters that RecA would train now, in the order of the model's own groups."""
    parameters = []
    for group in model.parameter_groups(0.0):
        parameters += group["params"]
    return parameters


class Stages:
    """The stages of one model, in the order of `run`. A class for each architecture follows.

    fraction: of the usual numbers of steps and scenes (for tests). All random numbers of an example
    come from (seed, a number for the stage, the example's position); the generator of torch, which
    makes the first weights and the noise on an autoencoder's latents, is seeded by the caller.
    """

    def __init__(self, model, seed, fraction):
        self.model = model
        self.seed = seed
        self.fraction = fraction
        self.config = model.config
        self.size = model.config.image_size
        # What a forward hook has seen last (stages with questions by place, or a regression).
        self.remembered = None

    def run(self):
        """Brings the model up."""
        raise NotImplementedError

    def count(self, usual, least):
        """The usual number times the fraction, and no fewer than `least`."""
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

    def generators(self, stage, positions):
        """A numpy generator for each position, the same for the same stage and seed."""
        return [generator(self.seed, stage, position) for position in positions]

    def crowded(self, positions, size):
        """Pictures for an autoencoder -> [B, 3, size, size] in [-1, 1]: most cells are full, with
        any shape any number of times. (White teaches nothing.)"""
        scenes = []
        for rng in self.generators(1, positions):
            full = [place for place in range(4) if rng.random() < 0.7]
            scenes.append([(place, int(rng.integers(4)), int(rng.integers(8))) for place in full])
        return draw(scenes, size)

    def random_scenes(self, usual):
        """A pool of scenes, `usual` unless there is a fraction. What frozen parts say of them is
        computed once."""
        pool = self.count(usual, least=64)
        return [common.random_scene(rng) for rng in self.generators(2, range(pool))]

    def pick(self, positions):
        """Each position's number in the pool self.scenes."""
        return [position * STRIDE % len(self.scenes) for position in positions]

    def frozen_features(self, samples, task):
        """What the frozen parts say of many samples, a dict each."""
        features = []
        for start in range(0, len(samples), 128):
            features += self.model.encode(samples[start:start + 128], task)
        return features

    def draws_with_text(self, task, features, positions):
        """The random numbers of a loss, but for one: no text is left out."""
        rng = Rng(self.seed, "places", positions[0], positions=positions)
        draws = self.model.draw(task, features, rng)
        draws["text_dropped"] = torch.zeros(len(features), dtype=torch.bool)
        return draws

    def read_captions(self, features, captions, positions):
        """The model paints behind captions. Only what the hook remembers of it counts."""
        draws = self.draws_with_text("t2i", features, positions)
        self.model.t2i_loss(features, captions, draws=draws)

    def read_images(self, features, templates, positions):
        """The model paints behind images. Only what the hook remembers of it counts."""
        draws = self.draws_with_text("recon", features, positions)
        self.model.recon_loss(features, templates, draws=draws)

    # Questions by place. A model that is asked has `features` of the pool to paint from, `shown` to
    # look at, the number `asking` of the stage, and answers_loss.

    def mixed_caption(self, scene, rng):
        """A caption to read before a question by place."""
        return shuffled_caption(scene, rng)

    def behind_captions_loss(self, positions):
        picked = self.pick(positions)
        rngs = self.generators(self.asking, positions)
        captions = [self.mixed_caption(self.scenes[i], rng) for i, rng in zip(picked, rngs)]
        self.read_captions([self.features[i] for i in picked], captions, positions)
        return self.answers_loss(picked, captions)

    def behind_images_loss(self, positions):
        picked = self.pick(positions)
        templates = [any_template(rng) for rng in self.generators(self.asking, positions)]
        self.read_images([self.shown[i] for i in picked], templates, positions)
        return self.answers_loss(picked, templates)

    def answers_loss(self, picked, texts):
        """How well what the hook remembers answers for the scenes `picked`, behind `texts`."""
        raise NotImplementedError


# ==== 3. Harmon ===================================================================================


class HarmonStages(Stages):
    """A VAE; a language model that describes images, and answers by place in the buffer tokens,
    behind words and behind images alike; then, with all of that frozen, generation from captions
    that name shapes and places, and seldom a color."""

    asking = 3

    def __init__(self, model, seed, fraction):
        super().__init__(model, seed, fraction)
        self.words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
        self.nothing = model.tokenizer.convert_tokens_to_ids(".")
        self.scenes = self.random_scenes(3200)

    def run(self):
        self.train_vae()
        self.scale_latents()
        self.encode_scenes()
        self.train_understanding()
        self.train_places()
        self.train_generation()

    # ---- the VAE ---------------------------------------------------------------------------------

    def train_vae(self):
        """Reconstruct, also from slightly disturbed latents, so that neighbours of a latent decode
        alike."""
        vae = self.model.vae.requires_grad_(True)
        self.train("VAE", vae.parameters(), self.vae_loss, steps=1200, lr=3e-3, batch=8)
        vae.requires_grad_(False)

    def vae_loss(self, positions):
        vae = self.model.vae
        pixels = self.crowded(positions, self.size)  # [B, 3, S, S]
        latents = vae.encode(pixels).latent_dist.mean  # [B, C, h, w]
        disturbed = latents + 0.05 * torch.randn_like(latents)
        return autoencoder_loss(vae.decode(disturbed).sample, pixels, latents)

    @torch.no_grad()
    def scale_latents(self):
        """From now on latents have unit variance, as diffusion wants them."""
        pixels = self.crowded(range(256), self.size)
        latents = self.model.vae.encode(pixels).latent_dist.mean
        self.config.vae_scale = 1 / latents.std().item()

    def encode_scenes(self):
        """The VAE is frozen, so the latents of the pool are computed once."""
        samples = [{"pixels": pixels} for pixels in draw(self.scenes, self.size)]
        self.features = self.frozen_features(samples, "i2t")
        self.shown = self.features
        # The image tokens are side x side latents of C channels.
        self.side = math.isqrt(self.features[0]["latents"][..., 0].numel())

    # ---- understanding ---------------------------------------------------------------------------

    def train_understanding(self):
        """Captions, and tags: an image token is to be near the words for what its cell holds."""
        trained = trained_by_reca(self.model)
        self.train("understanding", trained, self.understanding_loss, steps=120, lr=1.5e-3)

    def understanding_loss(self, positions):
        picked = self.pick(positions)
        seen = [self.features[i] for i in picked]
        talks = [description(self.scenes[i]) for i in picked]
        tags = torch.stack([scene_words(self.scenes[i], self.side) for i in picked])  # [B, N, 16]

        # Near means near in the language model's own table.
        table = self.model.llm.model.embed_tokens.weight[self.words]  # [16, D]
        scale = table.norm(dim=1).mean() ** 2
        tokens = self.model.understand(seen)[:, :self.side ** 2]  # [B, N, D]
        near = tokens @ table.T / scale  # [B, N, 16]
        tagging = F.binary_cross_entropy_with_logits(4 * near - 2, tags)
        return self.model.i2t_loss(seen, talks) + tagging

    # ---- questions by place ----------------------------------------------------------------------

    def train_places(self):
        """Behind either prompt, the buffer tokens, an equal number for each cell, are to say what
        is there."""
        trained = trained_by_reca(self.model)
        hook = self.model.proj_out.register_forward_pre_hook(self.remember_buffer)
        self.train("places", trained, self.places_loss, steps=720, lr=1.5e-3, batch=48)
        hook.remove()

    def remember_buffer(self, module, inputs):
        """What the language model hands to MAR's decoder is the buffer, then the image: of
        [B, E+V, D] remember [B, E, D]."""
        self.remembered = inputs[0][:, :self.config.buffer_size]

    def places_loss(self, positions):
        """Half of the questions behind captions and half behind images. Understanding goes on, with
        every other example, so that it is not forgotten."""
        half = len(positions) // 2
        loss = self.behind_captions_loss(positions[:half])
        loss = loss + self.behind_images_loss(positions[half:])
        return loss + self.understanding_loss(positions[::2])

    def answers_loss(self, picked, texts):
        logits = self.model.llm.lm_head(self.remembered).flatten(0, 1)  # [B*E, ids]
        targets = torch.cat([self.words_in_place(self.scenes[i]) for i in picked])  # [B*E, ids]
        return F.cross_entropy(logits, targets)

    def words_in_place(self, scene):
        """What each buffer token is to tell, a distribution over all ids -> [E, ids]."""
        ids = len(self.model.tokenizer)
        target = words_in_cell(scene, 2, self.words, self.nothing, ids)  # [4, ids]
        return target.repeat_interleave(self.config.buffer_size // 4, dim=0)  # [E, ids]

    # ---- generation ------------------------------------------------------------------------------

    def train_generation(self):
        """Only what paints is trained. Beside generation there is a regression: the decoder's
        conditions, read by one linear layer, are to tell the latents. Without it a model of this
        size needs thousands of steps until anything of the prompt arrives at the diffusion head."""
        model = self.model
        self.probe = nn.Linear(self.config.decoder_width, self.config.latent_channels)
        self.decode = model.mar.decode
        model.mar.decode = self.decode_and_remember

        paints = ("proj_out.", "mar.decoder", "mar.mask_token", "mar.diff")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(paints))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained += self.probe.parameters()
        self.train("generation", trained, self.generation_loss, steps=1200, lr=2e-3)
        # This brings back the method of the class.
        del model.mar.decode

    def decode_and_remember(self, *inputs):
        """In the place of MAR's decode, which is a method and cannot have a hook: it remembers the
        conditions [B, N, Dd]."""
        self.remembered = self.decode(*inputs)
        return self.remembered

    def generation_loss(self, positions):
        picked = self.pick(positions)
        rngs = self.generators(3, positions)
        painted = [self.features[i] for i in picked]
        captions = [sparse_caption(self.scenes[i], rng) for i, rng in zip(picked, rngs)]
        generation = self.model.t2i_loss(painted, captions)

        latents = torch.stack([image["latents"] for image in painted])  # [B, h, w, C]
        latents = latents.flatten(1, 2)  # [B, N, C]
        return generation + F.mse_loss(self.probe(self.remembered), latents)


# ==== 4. Show-o ===================================================================================


class ShowoStages(Stages):
    """An image tokenizer; language; CLIP, whose features become the words' own vectors;
    understanding from full captions and generation from sparse ones, with words in the places of
    CLIP's embeddings. The variant without CLIP does without the third."""

    asking = 5

    def __init__(self, model, seed, fraction):
        super().__init__(model, seed, fraction)
        self.with_clip = self.config.w_clip_vit
        self.scenes = self.random_scenes(4000)
        self.pictures = [common.draw_scene(scene, self.size) for scene in self.scenes]
        # The ids of the words, and of the comma that stands where there is nothing to say.
        self.known = [model.tokenize(word)[0] for word in WORDS]
        self.comma = model.tokenize(",")[0]
        # The tokenizer of the VQ variant also reads images of half the size.
        self.sizes = [self.size]
        if not self.with_clip:
            self.sizes.append(self.size // 2)

    def run(self):
        self.train_tokenizer()
        self.train_language()
        if self.with_clip:
            self.train_clip()
        self.encode_scenes()
        self.train_places()
        self.train_generation()

    # ---- the image tokenizer ---------------------------------------------------------------------

    def train_tokenizer(self):
        """The toy world has a few dozen kinds of 16 x 16 patches; the number of a kind is its code,
        which the encoder learns to predict and the decoder to paint. (A real tokenizer invents its
        codes; that takes longer.)"""
        self.kinds = self.kinds_of_patches()
        magvit = self.model.magvit.requires_grad_(True)
        self.train("image tokenizer", magvit.parameters(), self.tokenizer_loss, steps=800,
                   lr=2e-3, batch=16)
        magvit.requires_grad_(False)

    def kinds_of_patches(self):
        """Every patch that can come up, once -> [kinds, 768]."""
        # An empty cell, and one with each shape in each color.
        cells = [[]]
        for shape in range(4):
            for color in range(8):
                cells.append([(0, shape, color)])
        patches = []
        for size in self.sizes:
            drawn = self.patches(draw(cells, size))  # [33, N, 768]
            patches.append(drawn.flatten(0, 1))  # [33*N, 768]
        return torch.cat(patches).unique(dim=0)

    @staticmethod
    def patches(images):
        """images [B, 3, S, S] -> [B, N, 768], patches of 16 x 16 pixels in three colors."""
        return F.unfold(images, 16, stride=16).transpose(1, 2)  # [B, N, 768]

    def tokenizer_loss(self, positions):
        loss = 0
        for size in self.sizes:
            images = self.crowded(positions, size)  # [B, 3, size, size]
            signs = self.signs(images)  # [B, bits, h, w]
            bits = self.model.magvit.encoder(images)  # [B, bits, h, w]
            loss = loss + F.binary_cross_entropy_with_logits(bits, (signs > 0).float())
            loss = loss + F.mse_loss(self.model.magvit.decoder(signs), images)
        return loss

    def signs(self, images):
        """images [B, 3, S, S] -> [B, bits, h, w], the nearest kinds' codes in bits of -1 and 1."""
        side = images.shape[-1] // 16
        kinds = self.kinds.expand(len(images), -1, -1)  # [B, kinds, 768]
        distance = torch.cdist(self.patches(images), kinds)  # [B, N, kinds]
        signs = self.model.magvit.quantize.embedding[distance.argmin(-1)]  # [B, N, bits]
        return signs.transpose(1, 2).unflatten(2, (side, side))  # [B, bits, h, w]

    # ---- language --------------------------------------------------------------------------------

    def train_language(self):
        """A description with its objects in any order and with gaps, then the canonical one. The
        description stands where a caption stands, or in the places of the embeddings."""
        self.trained = trained_by_reca(self.model)
        self.train("language", self.trained, self.language_loss, steps=600, lr=2e-3)

    def language_loss(self, positions):
        scenes = [common.random_scene(rng) for rng in self.generators(3, positions)]
        loss = self.after_captions_loss(scenes, self.generators(4, positions))
        if not self.with_clip:
            return loss
        return loss + self.after_words_loss(scenes[::2])

    def after_captions_loss(self, scenes, rngs):
        """The description stands where a caption stands."""
        model = self.model
        ids = []
        labels = []
        for scene, rng in zip(scenes, rngs):
            mixed = self.surrounded(shuffled_caption(scene, rng), rng)
            prompt = [self.config.t2i, *model._between_eot(model.tokenize(mixed))]
            answer = model.tokenize(common.caption(scene)) + [self.config.eot]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([reca_showo.IGNORED] * len(prompt) + answer))

        padded = pad_sequence(ids, batch_first=True, padding_value=self.config.pad)  # [B, L]
        prompts = reca_showo.PromptBatch.causal(padded.tolist(), self.config.pad)
        labels = pad_sequence(labels, batch_first=True, padding_value=reca_showo.IGNORED)  # [B, L]
        prompts.labels = labels
        return self.prompt_loss(prompts)

    def after_words_loss(self, scenes):
        """The description stands, as single words, in the places of the embeddings."""
        ids, labels = self.model._pad_conversations([description(scene) for scene in scenes])
        prompts = self.model._i2t_batch(ids, labels, [{}] * len(scenes))
        words = torch.tensor([self.scene_ids(scene) for scene in scenes])  # [B, C]
        waiting = prompts.ids == reca_showo.UND  # [B, L]
        filled = prompts.ids.masked_scatter(waiting, words)  # [B, L]
        return self.prompt_loss(dataclasses.replace(prompts, ids=filled))

    def prompt_loss(self, prompts):
        """The cross-entropy of a text without understanding embeddings, as in i2t_loss."""
        prompts, targets = self.model._find_targets(prompts, shift=True)
        context = self.model.embed(prompts)  # [B, L, D]
        mask = prompts.dense_mask()  # [B, L, L]
        hidden = self.model.hidden_states(context, mask, prompts.positions)  # [B, L, D]
        return self.model._cross_entropy(hidden, targets)

    def surrounded(self, text, rng):
        """A caption with gaps in it and sometimes a template behind it: a word means the same
        wherever it is."""
        words = text.split()
        gaps = int(rng.integers(6)) if rng.random() < 0.5 else 0
        for _ in range(gaps):
            words.insert(int(rng.integers(len(words) + 1)), ",")
        if rng.random() < 0.4:
            words.append(f"<|endoftext|> USER: \n {any_template(rng)} ASSISTANT:")
        return " ".join(words)

    def scene_ids(self, scene):
        """A scene as C words: 4k + 0, 1, 2 are color, shape and place of what is in cell k."""
        ids = [self.comma] * self.config.num_clip
        for place, shape, color in scene:
            ids[4 * place] = self.known[4 + color]
            ids[4 * place + 1] = self.known[shape]
            ids[4 * place + 2] = self.known[12 + place]
        return ids

    # ---- CLIP ------------------------------------------------------------------------------------

    def train_clip(self):
        """CLIP and projector learn the words. CLIP sees images with its own statistics, and in RecA
        with the tokenizer's (see `und_view`)."""
        model = self.model
        asked = [model.preprocess(picture, "i2t")["clip_pixels"] for picture in self.pictures]
        asked = reca_showo.clip_normalize(common.normalize(torch.stack(asked)))  # [pool, 3, s, s]
        self.views = [model.und_view(draw(self.scenes, self.size)), asked]

        trained = [*model.clip.requires_grad_(True).parameters(), *model.mm_projector.parameters()]
        self.train("CLIP and projector", trained, self.clip_loss, steps=600, lr=2e-3)
        model.clip.requires_grad_(False)

    def clip_loss(self, positions):
        """One half of the batch is seen one way, one the other."""
        picked = self.pick(positions)
        seen = []
        for k, view in enumerate(self.views):
            seen.append(self.model.clip_features(view[picked[k::2]]))  # [B/2, C, width]
        return self.alignment_loss(torch.cat(seen), picked[::2] + picked[1::2])

    def alignment_loss(self, clip_features, picked):
        """Distance of the projected CLIP features [B, C, width] to the vectors of their words, and
        how well other words are told apart. Most are commas, which count less."""
        table = self.model.showo.model.embed_tokens
        words = torch.tensor([self.scene_ids(self.scenes[i]) for i in picked])  # [B, C]
        choice = torch.tensor([self.comma, *self.known])  # [17]
        target = table(words).detach()  # [B, C, D]
        others = table(choice).detach()  # [17, D]
        projected = self.model.mm_projector(clip_features)  # [B, C, D]
        scale = target.square().mean()

        apart = torch.cdist(projected.flatten(0, 1), others).square()  # [B*C, 17]
        right = (words.flatten()[:, None] == choice).long().argmax(1)  # [B*C]
        weight = torch.where(right == 0, 0.2, 1.0)  # [B*C]
        logits = -5 * apart / (scale * self.config.hidden)  # [B*C, 17]
        told_apart = (F.cross_entropy(logits, right, reduction="none") * weight).mean()
        return F.mse_loss(projected, target) / scale + told_apart

    # ---- questions by place ----------------------------------------------------------------------

    def encode_scenes(self):
        """Tokenizer and CLIP are frozen, so what they say of the pool is computed once: `shown` is
        for painting; `seen` is for describing, a list for each size of image."""
        model = self.model
        samples = [model.preprocess(picture, "recon") for picture in self.pictures]
        self.shown = self.frozen_features(samples, "recon")
        self.features = self.shown
        samples = [model.preprocess(picture, "i2t") for picture in self.pictures]
        self.seen = [self.frozen_features(samples, "i2t")]
        if not self.with_clip:
            samples = [{"pixels": pixels} for pixels in draw(self.scenes, self.size // 2)]
            self.seen.append(self.frozen_features(samples, "i2t"))

    def train_places(self):
        """Behind either prompt, the image tokens after the last layer but one are to tell what is
        in their cells."""
        side = math.isqrt(self.config.num_tokens)
        self.targets = [answers_in_cell(scene, side) for scene in self.scenes]  # [N, 17] each
        self.answers = nn.Linear(self.config.hidden, ANSWERS)
        trained = [*self.trained, *self.answers.parameters()]

        layer = self.model.showo.model.layers[-2]
        hook = layer.register_forward_hook(self.remember_image)
        self.model.train_embeddings_in_recon = True
        self.train("places", trained, self.places_loss, steps=1200, lr=1.5e-3, batch=36)
        self.model.train_embeddings_in_recon = False
        hook.remove()

    def remember_image(self, module, inputs, output):
        """The image tokens are the last ones of a prompt but for <eoi>: of [B, L, D] remember
        [B, N, D]."""
        self.remembered = output[:, -self.config.num_tokens - 1:-1]

    def places_loss(self, positions):
        """Questions behind captions, questions behind images, and eight descriptions, so that these
        are not forgotten."""
        # Captions are harder than images.
        split = len(positions) * 2 // 3
        loss = 2 * self.behind_captions_loss(positions[:split])
        loss = loss + self.behind_images_loss(positions[split:])
        return loss + self.describing_loss(positions[:8])

    def mixed_caption(self, scene, rng):
        return self.surrounded(shuffled_caption(scene, rng), rng)

    def answers_loss(self, picked, texts):
        logits = self.answers(self.remembered).flatten(0, 1)  # [B*N, 17]
        targets = torch.cat([self.targets[i] for i in picked])  # [B*N, 17]
        return F.cross_entropy(logits, targets)

    def describing_loss(self, positions):
        """Captions of images, and captions of captions. A batch has images of one size."""
        picked = self.pick(positions)
        one_size = self.seen[positions[0] // len(positions) % len(self.seen)]
        talks = [description(self.scenes[i]) for i in picked]
        loss = self.model.i2t_loss([one_size[i] for i in picked], talks)
        return loss + 0.5 * self.language_loss(positions)

    # ---- generation ------------------------------------------------------------------------------

    def train_generation(self):
        """In the last layer and the head alone, from captions that name shapes and places, and
        hardly ever a color."""
        for parameter in self.trained:
            parameter.requires_grad_(False)
        phi = self.model.showo.model
        last = nn.ModuleList([phi.layers[-1], phi.final_layernorm, self.model.showo.lm_head])
        last.requires_grad_(True)
        self.train("generation", last.parameters(), self.generation_loss, steps=1200, lr=2e-3)

    def generation_loss(self, positions):
        picked = self.pick(positions)
        captions = []
        for i, rng in zip(picked, self.generators(6, positions)):
            captions.append(self.surrounded(sparse_caption(self.scenes[i], rng, p=0.005), rng))
        rng = Rng(self.seed, "toy", positions=positions)
        loss = self.model.t2i_loss([self.shown[i] for i in picked], captions, rng=rng)
        return loss + 0.5 * self.describing_loss(positions[:8])


# ==== 5. OpenUni ==================================================================================


class OpenUniStages(Stages):
    """An autoencoder; a language model that describes and answers by place; a vision encoder whose
    embeddings say words; then, with all of that frozen, generation from captions that name shapes
    and places, and seldom a color."""

    def __init__(self, model, seed, fraction):
        super().__init__(model, seed, fraction)
        # There are side x side image tokens, and as many queries.
        self.side = math.isqrt(model.image_tokens)
        self.words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
        self.nothing = model.tokenizer.convert_tokens_to_ids(".")
        self.llm = model.lmm.model.language_model
        self.projector = model.lmm.model.multi_modal_projector
        self.table = model.lmm.get_input_embeddings().weight  # [ids, D]

    def run(self):
        self.train_autoencoder()
        self.scale_latents()
        self.train_language()
        self.train_vision()
        self.train_generation()

    def scenes_of(self, stage, positions):
        """(generator, scene) of each position, the same for the same seed."""
        drawn = []
        for rng in self.generators(stage, positions):
            scene = common.random_scene(rng)
            drawn.append((rng, scene))
        return drawn

    # ---- the autoencoder -------------------------------------------------------------------------

    def train_autoencoder(self):
        """DC-AE: reconstruct, also from slightly disturbed latents, as the generator will leave
        some disturbance."""
        vae = self.model.vae.requires_grad_(True)
        self.train("autoencoder", vae.parameters(), self.vae_loss, steps=1800, lr=3e-3, batch=8)
        vae.requires_grad_(False)

    def vae_loss(self, positions):
        vae = self.model.vae
        pixels = self.crowded(positions, self.size)  # [B, 3, S, S]
        latents = vae.encode(pixels).latent  # [B, C, h, w]
        disturbed = latents + 0.1 * torch.randn_like(latents)
        return autoencoder_loss(vae.decode(disturbed).sample, pixels, latents)

    @torch.no_grad()
    def scale_latents(self):
        """From now on latents have unit variance, as flow matching wants them."""
        pixels = self.crowded(range(256), self.size)
        latents = self.model.vae.encode(pixels).latent
        self.model.vae.register_to_config(scaling_factor=1 / latents.std().item())

    # ---- language --------------------------------------------------------------------------------

    def train_language(self):
        """Qwen2: descriptions and answers, from captions in any order and from image tokens that
        are mixtures of words. And questions by place: behind either prompt, the queries, one for
        each image token, are to say what is there, in any order."""
        language = nn.ModuleList([self.llm, self.model.lmm.lm_head]).requires_grad_(True)
        trained = [*language.parameters(), self.model.meta_queries]
        self.train("language", trained, self.language_loss, steps=1050, lr=1.5e-3, batch=16)
        self.train("places", trained, self.binding_loss, steps=675, lr=1.5e-3, batch=24)
        self.model.lmm.requires_grad_(False)

    def language_loss(self, positions):
        drawn = self.scenes_of(2, positions)
        return self.mixed_loss(drawn[::2], drawn[1::2], caption_share=0.5, describing=True)

    def binding_loss(self, positions):
        """Places above all, of captions above all: they are harder than images. Without a
        description now and then the model would forget how to give one."""
        drawn = self.scenes_of(12, positions)
        split = len(drawn) * 3 // 4
        every_third = positions[0] // len(positions) % 3 == 0
        return self.mixed_loss(drawn[:split], drawn[split:], caption_share=0.75,
                               describing=every_third)

    def mixed_loss(self, captioned, pictured, caption_share, describing):
        """Answers by place and, where `describing`, also descriptions, of scenes whose captions are
        in the prompt and of scenes whose image tokens are. Both are lists of (generator, scene)."""
        model = self.model
        captions = [shuffled_caption(scene, rng) for rng, scene in captioned]
        templates = [any_template(rng) for rng, _ in pictured]
        und = self.mixtures(pictured)  # [B, N, D]

        prompts = [model.t2i_prompt(caption) for caption in captions]
        caption_loss = self.queries_loss(prompts, [scene for _, scene in captioned])
        prompts = [model.recon_prompt(template) for template in templates]
        image_loss = self.queries_loss(prompts, [scene for _, scene in pictured], und)
        loss = caption_share * caption_loss + (1 - caption_share) * image_loss
        if not describing:
            return loss

        questions = [f"Generate an image: {caption}" for caption in captions] + templates
        conversations = []
        for (rng, scene), question in zip(captioned + pictured, questions):
            conversations.append(self.conversation_about(scene, question, rng))
        features = [{} for _ in captioned] + [{"und": embeddings} for embeddings in und]
        return loss + 2 * model.i2t_loss(features, conversations)

    def mixtures(self, drawn):
        """What the image tokens of (generator, scene) say, each word as loud as it likes
        -> [B, N, D]."""
        und = []
        for rng, scene in drawn:
            weights = loud_words(scene, self.side, rng)  # [N, 16]
            und.append(weights.to(self.table) @ self.table[self.words])  # [N, D]
        return torch.stack(und)

    def queries_loss(self, prompts, scenes, und=None):
        """Cross-entropy of what the queries say behind the prompts. und: [B, N, D], the embeddings
        of the image tokens, where the prompts have such."""
        model = self.model
        ids, mask = model._pad(prompts)  # [B, L]
        prompt = model._embed(ids, und)  # [B, L, D]
        queries = model.meta_queries.expand(len(prompts), -1, -1)  # [B, Q, D]
        mask = F.pad(mask, (0, queries.shape[1]), value=True)  # [B, L+Q]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)  # [B, L+Q]

        # This is one pass with a graph, since here the language model itself is trained.
        output = self.llm(
            inputs_embeds=torch.cat([prompt, queries], dim=1),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        )
        states = output.last_hidden_state[:, -queries.shape[1]:]  # [B, Q, D]
        logits = model.lmm.lm_head(states).flatten(0, 1)  # [B*Q, ids]
        targets = torch.cat([self.words_in_place(scene) for scene in scenes])  # [B*Q, ids]
        return F.cross_entropy(logits, targets)

    def words_in_place(self, scene):
        """What each query is to tell, a distribution over all ids -> [Q, ids]."""
        ids = len(self.model.tokenizer)
        return words_in_cell(scene, self.side, self.words, self.nothing, ids)

    def conversation_about(self, scene, question, rng):
        """A description, and an answer about one place."""
        place = int(rng.integers(4))
        answer = "."
        for where, shape, color in scene:
            if where == place:
                answer = f"{list(common.COLORS)[color]} {common.SHAPES[shape]}"
        return [(question, common.caption(scene)), (f"{common.PLACES[place]} ?", answer)]

    # ---- vision ----------------------------------------------------------------------------------

    def train_vision(self):
        """InternViT and the first half of mlp1 learn how much of each word is in an image token.
        The second half is set to the words' embeddings."""
        projector = self.projector
        set_to_words(projector.linear_2, self.table[self.words])

        hook = projector.act.register_forward_hook(self.remember_words)
        eyes = nn.ModuleList([
            self.model.lmm.model.vision_tower,
            projector.layer_norm,
            projector.linear_1,
        ])
        eyes.requires_grad_(True)
        self.train("vision", eyes.parameters(), self.vision_loss, steps=600, lr=2e-3)
        self.model.lmm.requires_grad_(False)
        hook.remove()

    def remember_words(self, module, inputs, output):
        """The hidden numbers that stand for words, before and after GELU: [B, N, 16] each."""
        before = inputs[0][..., :len(WORDS)]
        after = output[..., :len(WORDS)]
        self.remembered = before, after

    def vision_loss(self, positions):
        scenes = [scene for _, scene in self.scenes_of(3, positions)]
        pixels = self.model._vit_input(draw(scenes, self.size))  # [B, 3, s, s]
        self.model.lmm.model.get_image_features(pixels)
        before, after = self.remembered
        targets = torch.stack([scene_words(scene, self.side) for scene in scenes])  # [B, N, 16]
        return word_loss(before, after, targets)

    # ---- generation ------------------------------------------------------------------------------

    def train_generation(self):
        """Queries, connector, projector and SANA: text to image, from captions that always name
        shape and place, and one color in twenty-five."""
        trained = trained_by_reca(self.model)
        self.train("generation", trained, self.generation_loss, steps=1200, lr=1.5e-3)

    def generation_loss(self, positions):
        drawn = self.scenes_of(4, positions)
        pixels = draw([scene for _, scene in drawn], self.size)
        features = [{"latents": latents} for latents in self.model._latents(pixels)]
        captions = [sparse_caption(scene, rng) for rng, scene in drawn]
        return self.model.t2i_loss(features, captions)


# ==== 6. BAGEL ====================================================================================


class BagelStages(Stages):
    """An autoencoder; an understanding expert that reads and describes; a ViT whose embeddings are
    those of words; a generation expert that begins as a copy of the other (as BAGEL's did) and
    learns from sparse captions."""

    asking = 5

    def __init__(self, model, seed, fraction):
        super().__init__(model, seed, fraction)
        self.table = model.language_model["model"]["embed_tokens"].weight  # [ids, D]
        self.words = model.tokenizer.convert_tokens_to_ids(list(WORDS))
        # The ViT sees side x side patches.
        self.side = self.config.vit["image_size"] // self.config.vit["patch_size"]
        self.scenes = self.random_scenes(4096)
        drawn = [common.draw_scene(scene, self.size) for scene in self.scenes]
        self.pictures = [model.preprocess(picture, "recon") for picture in drawn]

    def run(self):
        self.train_autoencoder()
        self.scale_latents()
        self.train_language()
        self.train_vision()
        self.copy_expert()
        self.train_places_and_generation()

    # ---- the autoencoder -------------------------------------------------------------------------

    def train_autoencoder(self):
        """First on quarters of pictures (one cell, little work), then on whole ones, since its
        norms see the whole picture."""
        # The posterior's deviation is set, not learned: exp(-6 / 2) = 0.05.
        spread = self.model.vae.encoder.conv_out
        with torch.no_grad():
            spread.weight[self.config.vae_z_channels:] = 0
            spread.bias[self.config.vae_z_channels:] = -6

        vae = list(self.model.vae.requires_grad_(True).parameters())
        self.train("autoencoder, quarters", vae, self.quarters_loss, steps=600, lr=2e-3, batch=16)
        self.train("autoencoder", vae, self.wholes_loss, steps=400, lr=1e-3, batch=4)

    def quarters_loss(self, positions):
        """One cell of each picture, another one in the next batch."""
        pixels = self.crowded(positions, self.size)  # [B, 3, S, S]
        pixels = pixels.unflatten(2, (2, -1)).unflatten(4, (2, -1))  # [B, 3, 2, S/2, 2, S/2]
        row = positions[0] // 16 % 2
        column = positions[0] // 32 % 2
        quarters = pixels[:, :, row, :, column]  # [B, 3, S/2, S/2]
        return self.vae_loss(quarters)

    def wholes_loss(self, positions):
        return self.vae_loss(self.crowded(positions, self.size))

    def vae_loss(self, pixels):
        vae = self.model.vae
        mean = vae.encode(pixels).latent_dist.mean  # [B, C, 2h, 2w]
        disturbed = mean + 0.05 * torch.randn_like(mean)
        return autoencoder_loss(vae.decode(disturbed).sample, pixels, mean)

    def scale_latents(self):
        """The latents that RecA sees have mean 0 and deviation 1."""
        samples = [{"vae": picture["vae"]} for picture in self.pictures]
        self.features = self.frozen_features(samples, "t2i")
        means = torch.stack([image["mean"] for image in self.features[:512]])
        self.config.vae_scale_factor = 1 / means.std().item()
        self.config.vae_shift_factor = means.mean().item()

    # ---- language --------------------------------------------------------------------------------

    def train_language(self):
        """The understanding expert describes what stands in the places of the patches, mixtures of
        words, and repeats captions whose objects come in any order."""
        # In this stage an image's "vit" is [side, side, 16], the weight of each word in each place,
        # and understand() makes a mixture of the words' embeddings of it.
        model = self.model
        model.freeze(train_und=True)
        model.understand = self.mix_words
        named = model.language_model.named_parameters()
        expert = [parameter for name, parameter in named if "_moe_gen" not in name]
        self.train("language", expert, self.language_loss, steps=2000, lr=1e-3)
        # This brings back the method of the class.
        del model.understand
        model.freeze()

    def mix_words(self, features):
        """In the place of the model's own understand: B dicts -> [B, M, D]."""
        weights = torch.stack([image["vit"] for image in features])  # [B, side, side, 16]
        mixtures = (weights @ self.table[self.words]).flatten(1, 2)  # [B, M, D]
        return mixtures + self.model.vit_pos_embed(self.side, self.side)  # [B, M, D]

    def language_loss(self, positions):
        """Captions and images by turns."""
        features = []
        conversations = []
        for k, position in enumerate(positions):
            rng = generator(self.seed, 3, position)
            scene = common.random_scene(generator(self.seed, 4, position))
            if k % 2:
                weights = loud_words(scene, self.side, rng)  # [side*side, 16]
                weights = weights.unflatten(0, (self.side, self.side))  # [side, side, 16]
                features.append({"vit": weights})
                question = any_template(rng)
            else:
                features.append({})
                question = shuffled_caption(scene, rng)
            conversations.append([(question, common.caption(scene))])
        return self.model.i2t_loss(features, conversations)

    # ---- vision ----------------------------------------------------------------------------------

    def train_vision(self):
        """The ViT and the first half of the connector learn the words' weights. The second half is
        set to the words' embeddings."""
        connector = self.model.connector
        set_to_words(connector["fc2"], self.table[self.words])
        eyes = nn.ModuleList([self.model.vit_model, connector["fc1"]]).requires_grad_(True)
        self.train("vision", eyes.parameters(), self.vision_loss, steps=1200, lr=2e-3)

    def vision_loss(self, positions):
        picked = [position % len(self.scenes) for position in positions]
        pixels = torch.stack([self.pictures[i]["vit"] for i in picked])  # [B, 3, s, s]
        patches = self.model._vit(common.normalize(pixels)).flatten(1, 2)  # [B, M, Dv]
        before = self.model.connector["fc1"](patches)[..., :len(WORDS)]  # [B, M, 16]
        after = F.gelu(before, approximate="tanh")  # [B, M, 16]
        words = [scene_words(self.scenes[i], self.side) for i in picked]
        targets = torch.stack(words)  # [B, M, 16]
        return word_loss(before, after, targets)

    # ---- questions by place, and generation ------------------------------------------------------

    def copy_expert(self):
        """The generation expert starts as a copy of the other. All but what RecA trains is frozen
        from here on, so what it says of the pool is computed once."""
        model = self.model
        model.freeze()
        state = model.state_dict()
        model.load_state_dict({name: state[name.replace("_moe_gen", "")] for name in state})
        self.shown = self.frozen_features(self.pictures, "recon")

    def train_places_and_generation(self):
        """Questions by place: behind words and behind images, the latent tokens after the last
        layer but one are to tell what is in their cells. And generation, from captions that name
        shapes and places, and hardly ever a color."""
        height, _, _ = self.model._grid(self.shown[0]["mean"])
        self.targets = [answers_in_cell(scene, height) for scene in self.scenes]  # [N, 17] each
        self.answers = nn.Linear(self.table.shape[1], ANSWERS)
        trained = [*trained_by_reca(self.model), *self.answers.parameters()]

        hook = self.model.blocks()[-2].register_forward_hook(self.remember_latents)
        self.train("places and generation", trained, self.places_and_generation_loss, steps=2000,
                   lr=2e-3, batch=48)
        hook.remove()

    def remember_latents(self, module, inputs, output):
        """A layer gives two things: what it makes of the context, and of the latent tokens of all
        images, [B*N, D]."""
        self.remembered = output[1]

    def places_and_generation_loss(self, positions):
        """A third of the batch for each."""
        third = len(positions) // 3
        loss = self.behind_captions_loss(positions[:third])
        loss = loss + self.behind_images_loss(positions[third:2 * third])
        return loss + self.generation_loss(positions[2 * third:])

    def draws_with_text(self, task, features, positions):
        """Little of the image is left in the noise, or it would tell what is in its cells."""
        draws = super().draws_with_text(task, features, positions)
        draws["timestep_normal"] = draws["timestep_normal"] + 2.5
        return draws

    def answers_loss(self, picked, texts):
        """Images whose texts have one length stand together, those of the first length first."""
        groups = {}
        for i, text in zip(picked, texts):
            length = len(self.model.tokenize(text))
            groups.setdefault(length, []).append(self.targets[i])
        targets = []
        for group in groups.values():
            targets += group
        logits = self.answers(self.remembered)  # [B*N, 17]
        targets = torch.cat(targets)  # [B*N, 17]
        return F.cross_entropy(logits, targets)

    def generation_loss(self, positions):
        picked = self.pick(positions)
        captions = []
        for i, rng in zip(picked, self.generators(5, positions)):
            captions.append(sparse_caption(self.scenes[i], rng, p=0.005))
        rng = Rng(self.seed, "toy t2i", positions=positions)
        return self.model.t2i_loss([self.features[i] for i in picked], captions, rng=rng)


# ==== 7. Files and the command line ===============================================================

# Folder -> class, its name for these sizes, and the stages of its pretraining.
MODELS = {
    "harmon": (reca_harmon.Harmon, "tiny", HarmonStages),
    "showo": (reca_showo.Showo, "tiny", ShowoStages),
    "showo-vq": (reca_showo.Showo, "tiny-vq", ShowoStages),
    "openuni": (reca_openuni.OpenUni, "tiny", OpenUniStages),
    "bagel": (reca_bagel.Bagel, "tiny", BagelStages),
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
    model_class, size, stages_class = MODELS[name]
    torch.manual_seed(seed)
    model = model_class.random(size)
    model.train()
    stages_class(model, seed, fraction).run()

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
