"""The experiments on text: translation, language modelling, LoRA, each in miniature."""

# ruff: noqa: E402 - without the extra there is nothing to import
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

for package in ("tokenizers", "sacrebleu", "peft"):
    pytest.importorskip(package, reason="the extra experiments: text, BLEU and adapters")

from benchmarks.experiments import __main__ as command
from benchmarks.experiments.language import IGNORED, LanguageProtocol, LanguageTrial, mask
from benchmarks.experiments.lora import LoraArm, LoraProtocol, lora_trial
from benchmarks.experiments.text import BOS, EOS, MASK, PAD, SPECIAL, load_parallel, load_running
from benchmarks.experiments.translation import TranslationArm, TranslationProtocol, translate
from benchmarks.experiments.writing import TEXT
from benchmarks.models import TranslationTransformer

NOUNS = {"hund": "dog", "mann": "man", "ball": "ball", "baum": "tree", "berg": "mountain"}
VERBS = {"sieht": "sees", "malt": "paints", "nimmt": "takes"}


@pytest.fixture
def texts(tmp_path):
    """A directory with sentences in two languages, and one with them as running text."""
    triples = list(itertools.product(NOUNS, VERBS, NOUNS))
    german = [f"ein {a} {v} den {b}" for a, v, b in triples]
    english = [f"a {NOUNS[a]} {VERBS[v]} the {NOUNS[b]}" for a, v, b in triples]
    order = torch.randperm(len(triples)).tolist()
    for split, part in (("train", order[:55]), ("val", order[55:65]), ("test", order[65:])):
        for language, lines in (("de", german), ("en", english)):
            text = "\n".join(lines[k] for k in part) + "\n"
            (tmp_path / f"{split}.{language}").write_text(text)
    (tmp_path / "text.txt").write_text("\n".join(english * 8))
    (tmp_path / "other.txt").write_text("\n".join(german * 8))
    return tmp_path


def protocols(texts):
    """Of each experiment, the smallest there is."""
    model = {"width": 16, "hidden": 32, "heads": 2, "layers": 1}
    running = {**model, "length": 8, "batch": 8, "epochs": 3, "vocabulary": 300}
    text, other = str(texts / "text.txt"), str(texts / "other.txt")
    translation = TranslationProtocol(
        data=str(texts), vocabulary=300, epochs=3, tokens=200, beam=2, **model
    )
    return {
        "translation": translation,
        "carryover": replace(translation, optimizer="adamw", lr=1e-3, weight_decay=0.1),
        "language": LanguageProtocol(data=text, masked=True, optimizer="lamb", **running),
        "lora": LoraProtocol(
            data=other, first_data=text, first_epochs=1, rank=2, alpha=2, **running
        ),
    }


def trial(out, name, protocol, arm, key="key", after=None):
    """A trial of one arm."""
    return TEXT[name].trial(out, arm=arm, seed=0, protocol=protocol, key=key, after=after)


def finish(made):
    """Run a trial to its end."""
    while made.epoch < made.epochs:
        made.advance()
    return made.result()


ARMS = [(name, key) for name, experiment in TEXT.items() for key in experiment.arms]


@pytest.mark.covers("C25")
@pytest.mark.parametrize(("name", "key"), ARMS)
def test_an_interrupted_trial_ends_in_the_same_result(name, key, texts, tmp_path):
    """Stopped after all but one epoch, its state written and read again, bit for bit."""
    protocol, arm = protocols(texts)[name], TEXT[name].arms[key]
    if arm.after:
        finish(trial(tmp_path, name, protocol, TEXT[name].arms[arm.after], "before"))

    def make():
        return trial(tmp_path, name, protocol, arm, after=arm.after and "before")

    whole = make()
    expected = finish(whole)
    first = make()
    while first.epoch < first.epochs - 1:
        first.advance()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert repr(finish(second)) == repr(expected)  # NaN is not equal to itself
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --- translation ----------------------------------------------------------------------------------


def tiny():
    """A model whose target vocabulary is the special tokens and two words."""
    torch.manual_seed(3)
    model = TranslationTransformer(9, 7, width=8, hidden=16, heads=2, layers=1)
    torch.nn.init.normal_(model.output.weight, std=0.7)
    return model.double().eval()


def likelihood(model, source, words):
    """The mean log-probability of words that follow the beginning of the sentence."""
    target = torch.tensor([[BOS, *words]])
    scores = model(source, target[:, :-1]).log_softmax(-1)
    return float(scores[0].gather(1, target[0, 1:, None]).mean())


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_of_all_translations(seed):
    """Against trying all of up to three tokens, those without an end included."""
    model, longest = tiny(), 3
    source = torch.randint(5, 9, (1, 4), generator=torch.Generator().manual_seed(seed))
    words = [k for k in range(7) if k not in (PAD, BOS, EOS)]
    every = [
        [*start, *end]
        for count in range(longest + 1)
        for start in itertools.product(words, repeat=count)
        for end in ([[EOS]] if count < longest else [[]])
    ]
    with torch.no_grad():
        best = max(every, key=lambda found: likelihood(model, source, found))
    (found,) = translate(model, source, beam=40, longest=longest)
    assert found == [word for word in best if word != EOS]


def test_a_beam_of_one_is_greedy():
    """The likeliest token after the likeliest ones before."""
    model, source = tiny(), torch.tensor([[5, 6, 7, 8]])
    words = []
    while len(words) < 6 and words[-1:] != [EOS]:
        scores = model(source, torch.tensor([[BOS, *words]]))[0, -1]
        scores[[PAD, BOS]] = -math.inf
        words.append(int(scores.argmax()))
    assert translate(model, source, 1, longest=6) == [[w for w in words if w != EOS]]


@pytest.mark.parametrize("beam", [1, 3])
def test_sentences_are_translated_alike_alone_and_in_a_batch(beam):
    """Padding and neighbours change nothing."""
    model = tiny()
    sentences = [torch.randint(5, 9, (length,)) for length in (3, 7, 5)]
    padded = torch.nn.utils.rnn.pad_sequence(sentences, True, PAD)
    alone = [translate(model, each[None], beam, longest=8)[0] for each in sentences]
    assert translate(model, padded, beam, longest=8) == alone


def test_batches_hold_every_sentence_once_and_no_more_tokens_than_said(texts):
    """Padding included; their order depends on the generator."""
    text = load_parallel(str(texts), ("de", "en"), 300)
    orders = []
    for seed in (0, 1):
        seen = []
        for source, target, where in text.batches("train", 60, torch.Generator().manual_seed(seed)):
            assert max(source.numel(), target.numel()) <= 60
            for row, k in zip(source, where, strict=True):
                assert torch.equal(row[row != PAD], text.splits["train"][k][0])
            seen += where
        assert sorted(seen) == list(range(55))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_tokens_become_the_text_again(texts):
    """Of both languages, so that BLEU is that of text."""
    text = load_parallel(str(texts), ("de", "en"), 300)
    for (_, target), line in zip(text.splits["test"], text.references["test"], strict=True):
        assert (int(target[0]), int(target[-1])) == (BOS, EOS)
        assert text.tokenizers[1].decode(target.tolist()).strip() == line


def test_translation_learns(texts, tmp_path):
    """A small language, by heart, and then BLEU and perplexity are those of the references."""
    protocol = replace(
        protocols(texts)["translation"],
        epochs=60,
        lr=0.05,
        momentum=0.9,
        clip=1.0,
        dropout=0.0,
        width=32,
        hidden=64,
    )
    result = finish(trial(tmp_path, "translation", protocol, TranslationArm(label="", dense=True)))
    assert result["score"] > 80
    assert result["test perplexity"] < 1.5
    assert min(result["validation"]) < result["validation"][0] / 20


@pytest.mark.parametrize(("key", "kinds"), [("sifd", {"linear"}), ("siallfd", None), ("si", set())])
def test_the_products_that_decay_are_those_of_the_arm(key, kinds, texts, tmp_path):
    """Linear layers and embeddings, or attention's, too, or none."""
    made = trial(
        tmp_path, "translation", protocols(texts)["translation"], TEXT["translation"].arms[key]
    )
    decayed = {product.name for product in getattr(made.optimizer, "products", ())}
    attention = {name for name in decayed if name.endswith(("query_key", "output_value"))}
    assert bool(decayed) == (kinds != set())
    assert bool(attention) == (kinds is None)
    assert len(attention) in (0, 6)


def test_with_adamw_all_matrices_decay_and_products_as_products(texts, tmp_path):
    """Its rate rises and falls to zero; there is no momentum in D."""
    protocol, arms = protocols(texts)["carryover"], TEXT["carryover"].arms
    for key in ("dense", "si", "sifd"):
        made = trial(tmp_path, "carryover", protocol, arms[key])
        decays = {group["weight_decay"] for group in made.optimizer.param_groups}
        products = {group.get("frobenius_decay", 0.0) for group in made.optimizer.param_groups}
        assert max(decays | products) == 0.1
        assert (max(products) == 0.1) == (key == "sifd")
    rates = []
    for step in range(made.updates):
        made.steps = step
        rates.append(made.rate())
    assert max(rates) <= 1e-3
    assert rates[-1] == pytest.approx(1e-3 / 0.9 / (made.updates + 1))
    made.steps = 0
    finish(made)
    assert made.shrinkage == pytest.approx(0.1 * sum(rates))


BLIND = [(name, key) for name in TEXT for key, arm in TEXT[name].arms.items() if arm.blind]
OTHER = {"rank": 0.2, "weight_decay": 0.5}


@pytest.mark.parametrize(("name", "key"), BLIND)
def test_what_an_arm_is_blind_to_makes_no_difference(name, key, first, texts, tmp_path):
    """Its trials may be shared between variants that differ in nothing else."""
    arm, protocol = TEXT[name].arms[key], protocols(texts)[name]
    after = "before" if arm.after else None
    other = replace(protocol, **{field: OTHER[field] for field in arm.blind})
    assert other != protocol
    results = [finish(trial(tmp_path, name, each, arm, after=after)) for each in (protocol, other)]
    assert repr(results[0]) == repr(results[1])


def test_sides_of_different_lengths_are_refused(texts):
    """By the names of the files."""
    (texts / "val.de").write_text("ein hund\n")
    with pytest.raises(ValueError, match="expected as many val lines, got 1 and 10"):
        load_parallel(str(texts), ("de", "en"), 300)


# --- language modelling ---------------------------------------------------------------------------


def test_windows_hold_every_token_once(texts):
    """Of training from a random place on, of test in order."""
    text = load_running(str(texts / "text.txt"), 300)
    test = torch.cat([window.flatten() for window in text.windows("test", 7, 4)])
    assert torch.equal(test, text.test[: len(test)])
    assert len(text.test) - len(test) < 7
    numbered = replace(text, train=torch.arange(100))
    windows = list(numbered.batches(7, 3, torch.Generator().manual_seed(1)))
    seen = torch.cat([window.flatten() for window in windows])
    assert {tuple(window.shape) for window in windows} == {(3, 7)}
    assert len(seen.unique()) == len(seen) >= 100 - 7 - 7 - 3 * 7
    assert all((window.diff(dim=1) == 1).all() for window in windows)


def test_a_limit_is_of_the_training_text_alone(texts):
    """Validation and test are what they are."""
    whole, part = (load_running(str(texts / "text.txt"), 300, limit) for limit in (None, 500))
    assert len(part.train) < len(whole.train)
    decode = [text.tokenizer.decode(text.test.tolist()) for text in (whole, part)]
    assert decode[0] == decode[1]


def test_masks_are_of_the_stated_parts():
    """15 % are to be found: 80 % masked, 10 % replaced by no special token, 10 % left."""
    tokens = torch.full((400, 500), 40)
    seen, targets = mask(tokens, 50, torch.Generator().manual_seed(0))
    chosen = targets != IGNORED
    assert bool((targets[chosen] == 40).all())
    assert torch.equal(seen[~chosen], tokens[~chosen])
    parts = [chosen.double().mean(), *((seen[chosen] == k).double().mean() for k in (MASK, 40))]
    assert [float(part) for part in parts] == pytest.approx([0.15, 0.8, 0.1 + 0.1 / 45], abs=0.01)
    assert set(seen[chosen].unique().tolist()) - {MASK} == set(range(len(SPECIAL), 50))


@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_is_that_of_the_hidden_tokens(masked, texts, tmp_path):
    """Computed by hand from the scores of what the model sees."""
    protocol = replace(protocols(texts)["language"], masked=masked, dropout=0.0)
    made = LanguageTrial(tmp_path, TEXT["language"].arms["dense"], 0, protocol, "key")
    tokens, targets = next(made.batches())
    scores = made.model(tokens).log_softmax(-1)
    hidden = targets != IGNORED
    assert bool(hidden.all()) != masked
    expected = -scores[hidden].gather(1, targets[hidden][:, None]).mean()
    torch.testing.assert_close(made.compute_loss(tokens, targets), expected)
    if not masked:
        assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_the_mean_loss_counts_tokens_and_not_batches(texts, tmp_path):
    """The last batch is smaller than the others."""
    protocol = replace(protocols(texts)["language"], masked=False, batch=5)
    made = LanguageTrial(tmp_path, TEXT["language"].arms["dense"], 0, protocol, "key")
    made.model.eval()
    windows = torch.cat(list(made.text.windows("test", protocol.length + 1, 5)))
    assert len(windows) % 5
    with torch.no_grad():
        scores = made.model(windows[:, :-1]).flatten(0, 1)
        found = made.evaluate(made.text, "test")
    assert found == pytest.approx(float(cross_entropy(scores, windows[:, 1:].flatten())), rel=1e-5)


def test_the_rate_rises_and_falls_to_almost_nothing(texts, tmp_path):
    """Its largest value is the protocol's, the last step still is one."""
    protocol = replace(protocols(texts)["language"], epochs=10)
    made = LanguageTrial(tmp_path, TEXT["language"].arms["dense"], 0, protocol, "key")
    steps, rates = sum(1 for _ in made.batches()) * 10, []
    for made.steps in range(steps):
        rates.append(made.rate())
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(protocol.lr, rel=0.05)
    assert top == pytest.approx(0.1 * steps, abs=2)
    assert all(rate > 0 for rate in rates)
    assert rates[-1] < 0.05 * protocol.lr


def test_half_the_head_size_is_half_of_the_attention(texts, tmp_path):
    """And nothing else is smaller."""
    protocol = protocols(texts)["language"]
    whole, half = (
        trial(tmp_path, "language", protocol, TEXT["language"].arms[key]) for key in ("dense", "si")
    )
    attention = 4 * protocol.width**2 * protocol.layers
    assert whole.parameters() == whole.dense_parameters == half.dense_parameters
    assert whole.parameters() - half.parameters() == attention // 2


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.fixture
def first(texts, tmp_path):
    """The weights of a model that has learned the first text."""
    protocol = replace(protocols(texts)["lora"], first_epochs=4, first_lr=1e-2)
    return finish(trial(tmp_path, "lora", protocol, TEXT["lora"].arms["first"], "before"))


@pytest.mark.parametrize("decay", ["none", "plain", "delta", "full"])
def test_adapters_start_at_the_first_model_and_train_alone(decay, first, texts, tmp_path):
    """Their first loss on the other text is the model's; its own weights stay."""
    protocol = protocols(texts)["lora"]
    made = lora_trial(tmp_path, LoraArm(label="", decay=decay), 0, protocol, "key", "before")
    made.model.eval()
    with torch.no_grad():
        assert made.evaluate(made.text, "test") == pytest.approx(first["score"], rel=1e-5)
    made.advance()
    weights = torch.load(tmp_path / "before.weights", weights_only=True)
    held = made.model.state_dict()
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        adapted = f"base_model.model.{path}.base_layer.{last}"
        assert torch.equal(held.get(adapted, held.get(f"base_model.model.{name}")), value)


def test_adapters_learn_the_other_text(first, texts, tmp_path):
    """Which the first model does not know."""
    protocol = replace(protocols(texts)["lora"], epochs=10, lr=2e-2, dropout=0.0)
    after = finish(trial(tmp_path, "lora", protocol, TEXT["lora"].arms["delta"], after="before"))
    assert after["score"] < 0.8 * first["score"]
    assert first["score on the first text"] < first["score"]


def test_strong_decay_of_the_update_and_of_the_weight_differ(first, texts, tmp_path):
    """One brings the update to zero, the other the weight, for which the update has to grow."""
    norms = {}
    for decay in ("none", "delta", "full"):
        protocol = replace(protocols(texts)["lora"], epochs=6, lr=2e-2, weight_decay=3.0)
        made = trial(tmp_path, "lora", protocol, LoraArm(label="", decay=decay), after="before")
        norms[decay] = finish(made)["norms"]["norm"][-1]
    assert norms["delta"] < 0.7 * norms["none"]
    assert norms["full"] > 1.2 * norms["delta"]


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
def test_the_command_makes_a_table(name, texts, tmp_path, monkeypatch, capsys):
    """Whole tables in miniature, trials in processes of their own, one after another."""
    experiment, protocol = TEXT[name], replace(protocols(texts)[name], epochs=1)
    monkeypatch.setitem(experiment.presets["cpu"], next(iter(experiment.presets["cpu"])), protocol)
    for variant in list(experiment.presets["cpu"])[1:]:
        monkeypatch.delitem(experiment.presets["cpu"], variant)
    arms = ["first", "plain"] if name == "lora" else [experiment.baseline, "sifd"]
    command.main([name, "--arms", ",".join(arms), "--seeds", "1", "--out", str(tmp_path)])
    text = (tmp_path / f"{name}-cpu.md").read_text()
    assert all(experiment.arms[arm].label in text for arm in arms)
