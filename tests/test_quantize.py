"""--quantize int8: the error of a layer is bounded, what stays as it is stays, the tiny models paint
nearly the same pictures, nothing of full size arrives on the device, and the command line."""
import json
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
import reca_bagel
import reca_harmon
import reca_openuni
import reca_showo

ROOT = Path(__file__).parent.parent

# The linear layers of each model that stay, beside those of its autoencoder.
KEPT = {
    "harmon": {
        "llm.lm_head", "mar.z_proj", "mar.diffloss.net.input_proj",
        "mar.diffloss.net.final_layer.linear"},
    "showo": {"showo.lm_head"},
    "openuni": {"lmm.lm_head", "transformer.proj_out"},
    "bagel": {
        "language_model.lm_head", "vae2llm", "llm2vae",
        "vit_model.vision_model.embeddings.patch_embedding"},
}
SCRIPTS = {
    "harmon": (reca_harmon, reca_harmon.Harmon),
    "showo": (reca_showo, reca_showo.Showo),
    "openuni": (reca_openuni, reca_openuni.OpenUni),
    "bagel": (reca_bagel, reca_bagel.Bagel),
}
every_script = pytest.mark.parametrize("script", SCRIPTS)

# Show-o's variants are made of different parts.
VARIANTS = [(script, "tiny") for script in SCRIPTS] + [("showo", "tiny-vq")]


def random_model(script, name="tiny"):
    torch.manual_seed(0)
    return SCRIPTS[script][1].random(name).eval()


def int8_layers(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, common.Int8Linear)}


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# ---- one layer --------------------------------------------------------------------------------------


def uneven_matrix():
    """[64, 48]: rows of very different sizes, one of zeros, one with a single large number, and the
    rows whose scale bf16 rounds down the furthest."""
    torch.manual_seed(0)
    weight = torch.randn(64, 48) * torch.logspace(-6, 3, 64)[:, None]
    weight[3] = 0
    weight[4, 7] = 1000
    weight[5] = torch.linspace(-1, 1, 48) * 127 * (1 + 2 ** -8)
    return weight


def test_no_number_is_off_by_more_than_half_a_scale():
    weight = uneven_matrix()
    integers, scale = common.int8_rows(weight)
    assert integers.dtype == torch.int8
    assert scale.dtype == torch.bfloat16 and scale.shape == (64,)
    assert integers.abs().max() == 127 and integers.min() == -127

    again = integers.double() * scale.double()[:, None]
    error = (again - weight.double()).abs()
    # float32 divides with an error of 2^-24 of the quotient, which is 127 at most.
    half = scale.double()[:, None] * (0.5 + 127 * 2 ** -23)
    assert (error <= half).all()
    assert (again[3] == 0).all()

    # The scales are as small as they can be: 127 of them are the largest number, to bf16's rounding.
    largest = weight.abs().amax(dim=1)
    rest = torch.arange(64) != 3
    assert ((scale.float() * 127)[rest] <= largest[rest] * (1 + 2 ** -8)).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_error_of_a_layer_is_bounded(bias):
    """|y - W x - b| is at most half a scale times the sum of |x|, in float64 on both sides."""
    linear = nn.Linear(48, 64, bias=bias).double()
    linear.weight.data = uneven_matrix().double()
    layer = common.Int8Linear(linear)
    torch.manual_seed(1)
    x = torch.randn(2, 9, 48, dtype=torch.double)
    with torch.no_grad():
        error = (layer(x) - linear(x)).abs()
    size = x.abs().sum(dim=-1, keepdim=True)
    bound = size * layer.scale / 2 * (1 + 1e-4)
    assert error.shape == (2, 9, 64)
    assert (error <= bound).all()
    # The bound says something: the layer is not exact, and not all of its room is needed.
    rest = torch.arange(64) != 3
    assert (error.amax(dim=(0, 1)) > 0)[rest].all()


def test_precisions_of_a_layer():
    """bf16 rounds a result, and adds nothing to it: weights and scales are exact in bf16. Types are
    those of nn.Linear, with autocast and without."""
    linear = nn.Linear(48, 64)
    layer = common.Int8Linear(linear)
    x = torch.randn(5, 48).bfloat16()
    with torch.no_grad():
        exact = layer(x.float())
        in_bf16 = layer.to(torch.bfloat16)(x)
        assert in_bf16.dtype == torch.bfloat16
        assert layer.weight.dtype == torch.int8
        # Two roundings of the result to 8 bits, of the product and of the sum with the bias.
        size = exact.abs() + 2 * layer.bias.float().abs()
        assert ((in_bf16.float() - exact).abs() <= size * 2 ** -7).all()

        layer = layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x.float()).dtype == linear(x.float()).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            layer(x)
        with pytest.raises(RuntimeError):
            linear(x)


# ---- a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, name", VARIANTS)
def test_what_is_quantised_and_what_stays(script, name):
    before = random_model(script, name)
    model = random_model(script, name)
    assert common.quantize(model, None) is model
    assert not int8_layers(model)
    assert common.quantize(model, "int8") is model

    inside = ("vae.", "magvit.")
    stayed = {name for name in linear_layers(model) if not name.startswith(inside)}
    assert stayed == KEPT[script]
    int8 = int8_layers(model)
    assert int8.keys() == {name for name in linear_layers(before)
                           if name not in stayed and not name.startswith(inside)}

    # Everything else is what it was: norms, embeddings, convolutions, heads, biases, autoencoder.
    old, new = before.state_dict(), model.state_dict()
    changed = {f"{name}.weight" for name in int8}
    scales = {f"{name}.scale" for name in int8}
    assert new.keys() - old.keys() == scales
    assert not old.keys() - new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old.keys() - changed)
    assert all(new[key].dtype == torch.int8 for key in changed)
    others = {type(module) for name, module in before.named_modules() if name not in int8}
    now = {type(module) for module in model.modules()}
    assert now - others == {common.Int8Linear}

    # And no float copy is kept anywhere.
    for layer in int8.values():
        rows, columns = layer.weight.shape
        kept = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
        assert kept == rows * (columns + 4) + (0 if layer.bias is None else 4 * rows)


def test_a_tied_head_stays_tied():
    llm = common.quantize(random_model("harmon"), "int8").llm
    assert llm.lm_head.weight is llm.model.embed_tokens.weight


@pytest.mark.parametrize("script, name, gigabytes", [
    ("bagel", reca_bagel.DEFAULT, 16.08), ("harmon", "harmon-1.5b", 2.87),
    ("showo", reca_showo.DEFAULT, 2.38), ("openuni", "openuni-l-512", 5.77)])
def test_gigabytes_of_the_released_sizes(script, name, gigabytes):
    """The sizes alone, without memory. In bf16 these are 29.55, 5.12, 3.90 and 8.46 GB: a card of
    24 GB holds BAGEL, one of 8 GB each of the others."""
    module, model_class = SCRIPTS[script]
    with torch.device("meta"):
        model = common.quantize(model_class(module.CONFIGS[name]), "int8")
    model.to(torch.bfloat16)
    float32 = ("vae.",) if script == "bagel" else ("magvit.",)
    size = sum(tensor.nbytes * (2 if key.startswith(float32) else 1)
               for key, tensor in [*model.named_parameters(), *model.named_buffers()])
    assert size / 1e9 == pytest.approx(gigabytes, abs=0.01)


# ---- the command line -------------------------------------------------------------------------------


def run(script, *arguments):
    """main() in this process, as `python reca_<script>.py ...` would."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"reca_{script}.py", *map(str, arguments)])
        try:
            common.cli(SCRIPTS[script][0].main)
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)


PROMPTS = [f"{color} {shape} top-left" for color in ("red", "blue") for shape in common.SHAPES]


@pytest.fixture(scope="module", params=SCRIPTS)
def painted(request, tmp_path_factory):
    """The command line with --quantize int8, of every kind of inference -> (script, folder with
    model/ and out/). The model is random, without the zeros with which some outputs begin."""
    script = request.param
    home = tmp_path_factory.mktemp(script)
    model = random_model(script)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and not parameter.any():
                parameter.normal_(std=0.02)
        # Codes are discrete, and the layers of a random Show-o add little to the words' embeddings:
        # only with larger ones does the small error of int8 change a code.
        if script == "showo":
            for parameter in model.showo.model.layers.parameters():
                parameter.mul_(5)
            model.showo.lm_head.weight.mul_(4)
    (home / "model").mkdir()
    model.save_pretrained(home / "model")

    size = model.config.image_size
    (home / "images").mkdir()
    for k in range(2):
        scene = common.random_scene(np.random.default_rng(k))
        common.draw_scene(scene, size).save(home / "images" / f"{k}.png")
    (home / "prompts.txt").write_text("\n".join(PROMPTS))

    jobs = ["--generate", home / "prompts.txt", "--reconstruct", home / "images",
            "--describe", home / "images", "--max-new-tokens", 4, "--sampling-steps", 3,
            "--guidance-scale", 1]
    if script == "bagel":
        edits = {"edited": {"id": "0.png", "prompt": "remove the circle"}}
        (home / "edits.json").write_text(json.dumps(edits))
        jobs += ["--edit", home / "edits.json", "--edit-images", home / "images"]

    run(script, "--model", home / "model", "--steps", 0, "--quantize", "int8", "--precision", "fp32",
        *jobs, "--out", home / "out")
    return script, home


def test_the_command_line(painted):
    script, home = painted
    out = home / "out"
    names = {f"{k:05d}.png" for k in range(len(PROMPTS))}
    names |= {"0.png", "1.png", "reconstructions.png"}
    names |= {"edited.png"} if script == "bagel" else set()
    assert names == {path.name for path in out.glob("*.png")}
    assert len(common.read_json(out / "answers.jsonl", lines=True)) == 2
    assert common.read_json(out / "run.json")["arguments"]["quantize"] == "int8"

    # The pictures are those of the model in int8, to the last bit.
    pictures = {}
    for quantize in (None, "int8"):
        model = SCRIPTS[script][1].from_pretrained(str(home / "model"), quantize=quantize)
        assert bool(int8_layers(model)) == bool(quantize)
        made = model.generate(PROMPTS, seed=[0] * len(PROMPTS), num_steps=3, guidance_scale=1.0)
        pictures[quantize] = [picture.tobytes() for picture in made]
    written = [common.load_image(out / f"{k:05d}.png").tobytes() for k in range(len(PROMPTS))]
    assert written == pictures["int8"]
    assert written != pictures[None]


def test_losses_of_a_quantised_model_stay(painted):
    """L_recon on the same draws, which goes through understanding and generation."""
    script, home = painted
    model_class = SCRIPTS[script][1]
    losses = []
    for quantize in (None, "int8"):
        model = model_class.from_pretrained(str(home / "model"), quantize=quantize)
        scenes = [common.random_scene(np.random.default_rng(k)) for k in range(8)]
        pictures = [common.draw_scene(scene, model.config.image_size) for scene in scenes]
        with torch.no_grad():
            samples = [model.preprocess(picture, "recon") for picture in pictures]
            features = model.encode(samples, "recon")
            draws = common.Rng(0, "recon", positions=range(8))
            losses.append(model.recon_loss(features, [common.SEED_TEMPLATE] * 8, rng=draws).item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


class Sent(TorchDispatchMode):
    """Counts the bytes that go from the CPU to another device."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(operator)
        if source is not None and args[source].device.type == "cpu" and out.device.type != "cpu":
            self.bytes += out.nbytes
        return out


def test_nothing_of_full_size_arrives_on_the_device(painted):
    """The device is torch's meta device, which has no memory, but is another one than the CPU."""
    script, home = painted
    if script == "bagel":
        pytest.skip("goes tensor by tensor: see the next test")
    with Sent() as counter:
        model = SCRIPTS[script][1].from_pretrained(str(home / "model"), "meta", quantize="int8")
    holds = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    saved = sum(3 * layer.weight.numel() for layer in int8_layers(model).values())
    # Were the linear layers sent as float32, this would be far exceeded. (Some small tables are
    # sent, and made anew where they are.)
    assert 0.5 * holds < counter.bytes < 1.01 * holds
    assert saved > 0.1 * holds


def test_bagel_is_quantised_tensor_by_tensor():
    """Of the tensors that become int8, no more than the one at hand and the one before are alive."""
    source = random_model("bagel")
    with torch.device("meta"):
        model = reca_bagel.Bagel(source.config)
    int8 = {f"{name}.weight" for name in int8_layers(common.quantize(random_model("bagel"), "int8"))}
    alive, most = set(), 0

    def tensors():
        nonlocal most
        for name, parameter in source.named_parameters():
            tensor = parameter.detach().clone()
            if name in int8:
                alive.add(name)
                weakref.finalize(tensor, alive.discard, name)
                most = max(most, len(alive))
            yield name, tensor
            del tensor

    model._materialize(tensors(), torch.device("cpu"), torch.float32, "int8")
    assert 1 <= most <= 2
    same = common.quantize(source, "int8").state_dict()
    filled = model.state_dict()
    assert filled.keys() == same.keys()
    assert all(torch.equal(filled[key], same[key]) for key in same)


@every_script
@pytest.mark.parametrize("flags", [
    ("--steps", 3), ("--steps", 0, "--resume"), ("--steps", 0, "--bench"), ()])
def test_training_in_int8_is_refused(script, flags, tmp_path, capsys):
    """Also where --steps is not given: the recipe's number of steps is not 0."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run(script, "--model", "tiny", "--quantize", "int8", *flags, "--out", out)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --quantize is for inference: give --steps 0")
    assert told.count("\n") == 1
    assert not out.exists()


class Counting(reca_harmon.Harmon):
    """Notes how many images are painted at once."""

    def generate(self, prompts, **settings):
        self.painted_at_once.append(len(prompts))
        return super().generate(prompts, **settings)


@pytest.mark.parametrize("source, at_once", [("prompts.txt", [1, 1, 1]), ("dpg", [1, 1, 1, 1])])
def test_batch_images_1_paints_one_image_at_a_time(source, at_once, tmp_path):
    """A small card needs it, also for DPG-Bench's grids: they wait for their four pictures."""
    (tmp_path / "prompts.txt").write_text("red circle\nblue cross\ngreen square\n")
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "0.txt").write_text("red circle")
    model = Counting.random("tiny")
    model.painted_at_once = []
    args = common.parse_args("", reca_harmon.RECIPES, reca_harmon.DEFAULT, [
        "--steps", "0", "--batch-images", "1", "--sampling-steps", "1", "--out", str(tmp_path / "out")])
    jobs = common.prompt_jobs(tmp_path / source, tmp_path / "out", 1)
    common.generate_files(model, args, jobs)
    assert model.painted_at_once == at_once
    assert len(list((tmp_path / "out").glob("*.png"))) == (3 if source == "prompts.txt" else 1)


def test_another_kind_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("harmon", "--model", "tiny", "--steps", 0, "--quantize", "int4", "--out", tmp_path / "out")
    assert stop.value.code == 2
    assert "int4" in capsys.readouterr().err


# ---- scores -----------------------------------------------------------------------------------------


SCORED = [pytest.param(*variant, marks=() if variant[0] == "openuni" else pytest.mark.slow)
          for variant in VARIANTS]


@pytest.mark.parametrize("script, name", SCORED)
def test_scores_stay_within_a_point(script, name):
    """The toy world's scores of the pretrained tiny model that lies beside the scripts."""
    folder = ROOT / "tiny" / name.replace("tiny", script)
    steps = {"num_steps": 10} if script == "bagel" else {}
    scores = []
    for quantize in (None, "int8"):
        model = SCRIPTS[script][1].from_pretrained(str(folder), quantize=quantize)
        scores.append(common.score_toy(model, model.config.image_size, 128, 7, steps))
    difference = {name: 100 * (scores[1][name] - scores[0][name]) for name in scores[0]}
    assert abs(difference["overall"]) <= 1, difference
    assert abs(difference["reconstruction"]) <= 1, difference
