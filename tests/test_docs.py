"""README and docs: the lines that docs/equations.md quotes are there, the README's "Copy it" runs
in an empty folder, the exercises accept this project's own code and refuse wrong answers, links
lead somewhere.

    python tests/test_docs.py

writes the line numbers in docs/equations.md and the lengths of files in the README anew.
"""
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
EQUATIONS = ROOT / "docs" / "equations.md"
EXERCISES = ROOT / "docs" / "exercises"

# A row of docs/equations.md: | paper | what it says | `file:line` | `quote` |
ROW = re.compile(r"^(\| (?P<paper>.+?) \| .* \| `)(?P<file>[\w./-]+):(?P<line>\d+)"
                 r"(` \| `(?P<quote>.*)` \|)$", re.M)
# A row of the README's table of files: | `file` | about N lines | (or @@...@@, to be filled in)
LENGTH = re.compile(r"^(\| `(?P<file>\w+\.py)` \| about )(?P<count>[\w,@]+)( lines \|)", re.M)


# ---- line numbers --------------------------------------------------------------------------------


def lines_with(file, quote):
    """The numbers of the lines of a file that hold the quote."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, start=1) if quote in line]


def quoted(row):
    """The text that a row of docs/equations.md quotes; a table writes | as \\|."""
    return row["quote"].replace("\\|", "|")


def complaint(row):
    """What is wrong with a row of docs/equations.md, and where its line is now; None: nothing."""
    found = lines_with(row["file"], quoted(row))
    place = f"{row['file']}:{row['line']}"
    if found == [int(row["line"])]:
        return None
    if not found:
        return f"{place} {row['paper']}: no line says `{quoted(row)}`"
    if len(found) > 1:
        return f"{place} {row['paper']}: `{quoted(row)}` stands at lines {found}, quote more of it"
    return f"{place} {row['paper']}: `{quoted(row)}` now stands at line {found[0]}"


def with_new_numbers(text):
    """docs/equations.md with the line numbers of today, where a quote stands in one line only."""
    def renumber(row):
        found = lines_with(row["file"], quoted(row))
        number = found[0] if len(found) == 1 else row["line"]
        return f"{row[1]}{row['file']}:{number}{row[5]}"
    return ROW.sub(renumber, text)


def length(file):
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


def with_new_lengths(text):
    """The README with the files' lengths of today, to the next fifty."""
    def recount(row):
        return f"{row[1]}{round(length(row['file']) / 50) * 50:,}{row[4]}"
    return LENGTH.sub(recount, text)


def main():
    """Writes both anew, and names the rows that need a hand: there is no such line, or several."""
    EQUATIONS.write_text(with_new_numbers(EQUATIONS.read_text(encoding="utf-8")), encoding="utf-8")
    README.write_text(with_new_lengths(README.read_text(encoding="utf-8")), encoding="utf-8")
    left = [complaint(row) for row in ROW.finditer(EQUATIONS.read_text(encoding="utf-8"))]
    for line in filter(None, left):
        print(line)


def test_each_quoted_line_is_where_equations_md_says():
    rows = list(ROW.finditer(EQUATIONS.read_text(encoding="utf-8")))
    wrong = list(filter(None, map(complaint, rows)))
    assert not wrong, "\n".join(["python tests/test_docs.py writes new numbers:", *wrong])


def test_each_equation_has_a_line():
    text = EQUATIONS.read_text(encoding="utf-8")
    rows = list(ROW.finditer(text))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    headers = [line for line in lines if line.startswith("| paper |")]
    assert len(rows) == len(lines) - len(headers)  # no row is written so that it escapes the check
    assert {f"({number})" for number in range(1, 15)} <= {row["paper"] for row in rows}


def test_a_moved_line_is_found_again():
    text = "| (3) | the sum | `common.py:1` | `class InputError(Exception):` |\n"
    row = ROW.search(text)
    number = lines_with("common.py", "class InputError(Exception):")[0]
    assert complaint(row).endswith(f"now stands at line {number}")
    assert f"common.py:{number}`" in with_new_numbers(text)
    gone = ROW.search(text.replace("InputError(Exception)", "NoSuchThing()"))
    assert "no line says" in complaint(gone)
    often = ROW.search(text.replace("class InputError(Exception):", "import"))
    assert "quote more of it" in complaint(often)


# ---- README --------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 1500


def test_the_lengths_in_the_readme_are_about_right():
    rows = list(LENGTH.finditer(README.read_text(encoding="utf-8")))
    files = {path.name for path in ROOT.glob("*.py")} - {"conftest.py"}
    assert {row["file"] for row in rows} == files
    for row in rows:
        if row["count"][0].isdigit():
            written = int(row["count"].replace(",", ""))
            assert written == pytest.approx(length(row["file"]), rel=0.1), row["file"]


def heading_names(path):
    """The names under which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "docs", "docs/exercises", "tiny"])
def test_links_lead_somewhere(page):
    for path in [ROOT / page] if page.endswith(".md") else sorted((ROOT / page).glob("[!_]*.md")):
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            name, _, heading = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), f"{path.name}: {link}"
            assert not heading or heading in heading_names(target), f"{path.name}: {link}"


def test_each_page_of_the_docs_is_named_in_the_readme():
    text = README.read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("[!_]*.md"):
        assert f"](docs/{path.name})" in text


def test_the_tables_of_memory_md_can_be_written_again():
    """tests/fakegpu/table.py writes each between two marks, under the header that it has there."""
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- table: (\w+) -->\n\| model \|.*?\n<!-- end -->", text, re.S)
    assert found == ["training", "inference"]


@pytest.mark.parametrize("step, command", [("install", "pip install"), ("test", "pytest")])
def test_the_automatic_run_finds_its_commands(step, command):
    """.ci/run takes its two commands from the README, by its own reading of the marks."""
    code = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = re.search(r"^block\(\) .*$", code, re.M)[0]
    script = ["bash", "-euc", f"{function}\nblock {step}"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    assert command in done.stdout and len(done.stdout.splitlines()) == 1


def test_copy_it(tmp_path, monkeypatch):
    """The README's twenty lines in an empty folder, beside a copy of the script, common.py and the
    tiny model's files: only the model's name and the number of steps are other ones."""
    import common
    text = README.read_text(encoding="utf-8")
    block = re.search(r"^## Copy it$.*?```python\n(.*?)```", text, re.M | re.S)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    replacements = {'"openuni-b-512"': '"tiny"', "range(5000)": "range(2)"}
    for old, new in replacements.items():
        assert block.count(old) == 1
        block = block.replace(old, new)

    for file in ("common.py", "reca_openuni.py"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "tiny" / "openuni", tmp_path / "tiny" / "openuni")
    (tmp_path / "images").mkdir()
    for number in range(3):
        scene = common.random_scene(common.np.random.default_rng(number))
        common.draw_scene(scene, 48).save(tmp_path / "images" / f"{number}.jpg")

    # In this process, as importing the libraries again takes longer than all else; but without the
    # modules of this checkout.
    monkeypatch.chdir(tmp_path)
    elsewhere = [entry for entry in sys.path if str(ROOT) not in entry]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for name in [name for name, module in sys.modules.items() if is_ours(module)]:
        monkeypatch.delitem(sys.modules, name)
    names = {}
    try:
        exec(compile(block, "README.md", "exec"), names)
        assert not [name for name, module in sys.modules.items() if is_ours(module)]
    finally:
        for name in ("common", "reca_openuni"):
            sys.modules.pop(name, None)  # monkeypatch then brings our own back

    assert names["loss"].isfinite()
    trained = names["OpenUni"].from_pretrained("mine").state_dict()
    begun = names["OpenUni"].from_pretrained("tiny").state_dict()
    moved = {name.split(".")[0] for name, value in trained.items() if not value.equal(begun[name])}
    # What RecA trains, and no more.
    assert moved == {"meta_queries", "connector", "projector", "transformer"}


def is_ours(module):
    """Is it a module of this checkout, other than a test?"""
    path = Path(getattr(module, "__file__", None) or "/")
    return path.parent == ROOT and path.name != "conftest.py"


# ---- exercises -----------------------------------------------------------------------------------


def exercise(name, monkeypatch):
    """(the file to fill in, its checks)."""
    monkeypatch.syspath_prepend(str(EXERCISES))
    return importlib.import_module(name), importlib.import_module(f"check_{name}").check


def our_objective():
    import common
    return common.objective


def our_prompt():
    """OpenUni's own. A stand-in for the model has a table of words and the id of an image place."""
    import reca_openuni

    def embed_prompt(ids, und, words, image_id):
        config = SimpleNamespace(image_token_id=image_id)
        lmm = SimpleNamespace(config=config, get_input_embeddings=lambda: words)
        stand_in = SimpleNamespace(lmm=lmm, device=words.weight.device)
        return reca_openuni.OpenUni._embed(stand_in, ids, und)
    return embed_prompt


def our_masked_diffusion():
    """Harmon's own: the hidden tokens, then the first of its two terms, over 1000 steps."""
    import torch
    import reca_harmon

    def masked_diffusion_loss(net, latents, z, masked, t, noise, alphas_cumprod):
        schedule = reca_harmon.diffusion_schedule(1000, torch.device("cpu"))
        assert torch.allclose(schedule["alphas_cumprod"], alphas_cumprod, atol=1e-6)
        x_0 = reca_harmon.take(latents, masked).flatten(0, 1)
        z = reca_harmon.take(z, masked).flatten(0, 1)
        mse, _ = reca_harmon.diffusion_terms(net, x_0, z, t.flatten(), noise.flatten(0, 1))
        return mse.mean()
    return masked_diffusion_loss


def our_guidance():
    """BAGEL's own, without its guidance by images; renorm_min is the smallest factor of length."""
    import reca_bagel

    def guide(conditional, unconditional, scale, renormalise=False):
        renorm_min = 0.0 if renormalise else 1.0
        velocities = [conditional, unconditional]
        return reca_bagel.Bagel.guide(velocities, scale, 1.0, "global", renorm_min)
    return guide


OURS = {"equation3": our_objective, "prompt": our_prompt, "masked_diffusion": our_masked_diffusion,
        "guidance": our_guidance}


@pytest.mark.parametrize("name", OURS)
def test_an_exercise_accepts_our_own_code(name, monkeypatch):
    _, check = exercise(name, monkeypatch)
    check(OURS[name]())


@pytest.mark.parametrize("name", OURS)
def test_an_exercise_is_not_filled_in_and_names_our_own_code(name, monkeypatch):
    module, check = exercise(name, monkeypatch)
    with pytest.raises(NotImplementedError, match="fill in"):
        check(next(value for value in vars(module).values() if callable(value)))
    function, file = re.search(r"Our own:\s`(\w+)` in (\w+\.py)", module.__doc__).groups()
    assert lines_with(file, f"def {function}("), f"{file} has no {function}"


def test_exercises_are_not_collected_with_the_tests():
    for path in EXERCISES.glob("*.py"):
        assert not re.match(r"test_.*\.py|.*_test\.py", path.name)


def wrong(name, message):
    """Registers a wrong answer to an exercise, and what its check must say of it."""
    def register(answer):
        WRONG.append(pytest.param(name, answer, message, id=f"{name}-{answer.__name__}"))
        return answer
    return register


WRONG = []


@wrong("equation3", "without their weights")
def weighted_values(losses, weights, backward):
    values = {}
    for name, loss in losses.items():
        if weights[name]:
            values[name] = 0
            for share in loss():
                backward(weights[name] * share)
                values[name] += weights[name] * share.detach()
    return sum(values.values()), values


@wrong("equation3", "must not be computed")
def everything_is_computed(losses, weights, backward):
    values = {}
    for name, loss in losses.items():
        values[name] = 0
        for share in loss():
            backward(weights[name] * share)
            values[name] += share.detach()
    return sum(weights[name] * value for name, value in values.items()), values


@wrong("equation3", "before the next is computed")
def one_backward_for_all(losses, weights, backward):
    values = {name: sum(loss()) for name, loss in losses.items() if weights[name]}
    total = sum(weights[name] * value for name, value in values.items())
    backward(total)
    return total.detach(), {name: value.detach() for name, value in values.items()}


@wrong("equation3", "not their mean")
def mean_of_the_shares(losses, weights, backward):
    values = {}
    for name, loss in losses.items():
        if weights[name]:
            shares = []
            for share in loss():
                backward(weights[name] * share)
                shares.append(share.detach())
            values[name] = sum(shares) / len(shares)
    return sum(weights[name] * value for name, value in values.items()), values


@wrong("equation3", "multiplied by its own λ")
def gradients_without_weights(losses, weights, backward):
    values = {}
    for name, loss in losses.items():
        if weights[name]:
            values[name] = 0
            for share in loss():
                backward(share)
                values[name] += share.detach()
    return sum(weights[name] * value for name, value in values.items()), values


@wrong("equation3", "detached")
def graphs_are_kept(losses, weights, backward):
    values = {}
    for name, loss in losses.items():
        if weights[name]:
            values[name] = 0
            for share in loss():
                backward(weights[name] * share)
                values[name] = values[name] + share
    return sum(weights[name] * value for name, value in values.items()), values


@wrong("prompt", "do not add to it")
def added(ids, und, words, image_id):
    embeds = words(ids)
    filled = embeds.masked_scatter((ids == image_id)[..., None], und)
    return embeds.where((ids != image_id)[..., None], embeds + filled)


@wrong("prompt", "reverse order")
def reversed_order(ids, und, words, image_id):
    return words(ids).masked_scatter((ids == image_id)[..., None], und.flip(1))


@wrong("prompt", "first image")
def first_image_everywhere(ids, und, words, image_id):
    return words(ids).masked_scatter((ids == image_id)[..., None], und[:1].expand_as(und))


@wrong("prompt", "elsewhere than the first")
def one_position_for_all(ids, und, words, image_id):
    embeds = words(ids).clone()
    embeds[:, 2:2 + und.shape[1]] = und
    return embeds


@wrong("prompt", "gradient must reach every understanding embedding")
def detached(ids, und, words, image_id):
    return words(ids).masked_scatter((ids == image_id)[..., None], und.detach())


@wrong("prompt", "not be cut silently")
def never_counted(ids, und, words, image_id):
    places = ids == image_id
    if und.shape[1] < int(places.sum(1).max()):
        raise ValueError("too few")
    return words(ids).masked_scatter(places[..., None], und)


def tokens_at(values, places):
    """values [B, N, K] at the places [B, M] -> [B * M, K]."""
    index = places[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index).flatten(0, 1)


def noise_loss(net, x_0, z, t, noise, signal, spread):
    """What the wrong answers below share: signal and spread are the factors of token and noise."""
    noise = noise.flatten(0, 1)
    predicted = net(signal * x_0 + spread * noise, t.flatten(), z)[:, :x_0.shape[-1]]
    return (noise - predicted).square().mean()


@wrong("masked_diffusion", "square roots")
def no_square_roots(net, latents, z, masked, t, noise, alphas_cumprod):
    abar = alphas_cumprod[t.flatten()][:, None]
    x_0 = tokens_at(latents, masked)
    return noise_loss(net, x_0, tokens_at(z, masked), t, noise, abar, 1 - abar)


@wrong("masked_diffusion", "each other's factor")
def swapped_factors(net, latents, z, masked, t, noise, alphas_cumprod):
    abar = alphas_cumprod[t.flatten()][:, None]
    x_0 = tokens_at(latents, masked)
    return noise_loss(net, x_0, tokens_at(z, masked), t, noise, (1 - abar).sqrt(), abar.sqrt())


@wrong("masked_diffusion", "first M tokens")
def the_first_tokens(net, latents, z, masked, t, noise, alphas_cumprod):
    abar = alphas_cumprod[t.flatten()][:, None]
    x_0 = latents[:, :masked.shape[1]].flatten(0, 1)
    return noise_loss(net, x_0, tokens_at(z, masked), t, noise, abar.sqrt(), (1 - abar).sqrt())


@wrong("masked_diffusion", "condition of its own place")
def conditions_of_other_places(net, latents, z, masked, t, noise, alphas_cumprod):
    abar = alphas_cumprod[t.flatten()][:, None]
    z = z[:, :masked.shape[1]].flatten(0, 1)
    return noise_loss(net, tokens_at(latents, masked), z, t, noise, abar.sqrt(), (1 - abar).sqrt())


@wrong("masked_diffusion", "not over all places")
def mean_over_all_places(net, latents, z, masked, t, noise, alphas_cumprod):
    right = our_masked_diffusion()(net, latents, z, masked, t, noise, alphas_cumprod)
    return right * masked.shape[1] / latents.shape[1]


@wrong("masked_diffusion", "not the clean token")
def predicts_the_clean_token(net, latents, z, masked, t, noise, alphas_cumprod):
    abar = alphas_cumprod[t.flatten()][:, None]
    x_0 = tokens_at(latents, masked)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * noise.flatten(0, 1)
    predicted = net(x_t, t.flatten(), tokens_at(z, masked))[:, :x_0.shape[1]]
    return (x_0 - predicted).square().mean()


@wrong("masked_diffusion", "about the hidden tokens only")
def asks_about_all_tokens(net, latents, z, masked, t, noise, alphas_cumprod):
    places = latents.shape[0] * latents.shape[1]
    t = t.flatten()[:1].expand(places)
    net(latents.flatten(0, 1), t, z.flatten(0, 1))
    return noise.mean()


@wrong("guidance", "counts from 1")
def counted_from_zero(conditional, unconditional, scale, renormalise=False):
    return our_guidance()(conditional, unconditional, scale + 1, renormalise)


@wrong("guidance", "each other's place")
def swapped_answers(conditional, unconditional, scale, renormalise=False):
    return our_guidance()(unconditional, conditional, scale, renormalise)


@wrong("guidance", "must be shrunk")
def never_shrunk(conditional, unconditional, scale, renormalise=False):
    return our_guidance()(conditional, unconditional, scale)


@wrong("guidance", "a factor for each token")
def one_factor_for_each_token(conditional, unconditional, scale, renormalise=False):
    guided = our_guidance()(conditional, unconditional, scale)
    factor = conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    return guided * factor.clamp(max=1) if renormalise else guided


@wrong("guidance", "must not be stretched")
def stretched(conditional, unconditional, scale, renormalise=False):
    guided = our_guidance()(conditional, unconditional, scale)
    return guided * conditional.norm() / guided.norm() if renormalise else guided


@wrong("guidance", "must not be written to")
def in_place(conditional, unconditional, scale, renormalise=False):
    guided = our_guidance()(conditional, unconditional, scale, renormalise)
    return conditional.copy_(guided)


@pytest.mark.parametrize("name, answer, message", WRONG)
def test_an_exercise_refuses_a_wrong_answer(name, answer, message, monkeypatch):
    _, check = exercise(name, monkeypatch)
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(answer)


if __name__ == "__main__":
    main()
