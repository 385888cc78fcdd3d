"""The benchmark of pretrained models, on tiny ones: every part, resumed, of another protocol."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import tokenizers
import torch
import transformers
import zoo

from benchmarks import pretrained

WORDS = [f"w{k}" for k in range(50)]
SMALL = ["--size=calibration=8", "--size=test=6", "--size=held=6", "--size=train=8", "--threads=1"]
SHORT = ["--seeds=2", "--batch=4", "--shares=0.5", "--decays=1", "--share=0.5"]


def folder_of(path, model):
    """A folder of transformers with a tokenizer of words."""
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    kind = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    kind.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=kind, **names).save_pretrained(path)
    model.save_pretrained(path)
    return str(path)


def text_of(path, seed):
    """A file of sentences."""
    found = torch.randint(50, (300, 7), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text("\n".join(" ".join(WORDS[k] for k in line) for line in found))
    return str(path)


def models(kind):
    """A model for each task."""
    if kind == "encoder":
        config = transformers.BertConfig(**zoo.SMALL, **zoo.NO_DROPOUT)
        return transformers.BertModel(config)
    return zoo.llama()[0]


@pytest.mark.filterwarnings("ignore:.*a step of decay is")
@pytest.mark.parametrize("kind", ["encoder", "language"])
def test_every_part_runs_and_is_resumed(kind, tmp_path, monkeypatch):
    """Cells are kept; what is there is not run again; results of another protocol are refused."""
    monkeypatch.setattr("benchmarks.tasks.Language.length", 16)
    folder = folder_of(tmp_path / "model", models(kind))
    texts = [f"--text={name}={text_of(tmp_path / name, k)}" for k, name in enumerate("ab")]
    command = [kind, folder, *texts, *SMALL, *SHORT, f"--out={tmp_path}"]
    pretrained.main([*command, "--parts=compress", "--allocations=uniform"])
    arms = "--arms=none,plain,fd,initial,weight,spectral,random"
    monkeypatch.setattr("benchmarks.pretrained.interleave", lambda runs, *_, **__: dict.fromkeys(
        runs, pretrained_timing()))  # fmt: skip
    record = pretrained.main([*command, "--parts=compress,cost,recover", arms])
    assert len(record["cells"]) == 2 + 3 + 3 + 1 + 2 * 7
    kept = [cell["kept"] for key, cell in record["cells"].items() if key.startswith("compress")]
    assert all(0.4 < share < 0.6 for share in kept)
    assert [row["chosen"] for row in record["tables"]["After a little training"]] == ["×"] * 7

    def forbidden(*_, **__):
        raise AssertionError("it ran again")

    monkeypatch.setattr("benchmarks.pretrained.compressed", forbidden)
    again = pretrained.main([*command, "--parts=compress,cost,recover", arms])
    assert again["cells"] == record["cells"]
    written = tmp_path / f"pretrained-{kind}"
    assert json.loads(written.with_suffix(".json").read_text())["cells"] == record["cells"]
    assert "calibrated:a" in written.with_suffix(".md").read_text()
    assert written.with_suffix(".png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="of another protocol"):
        pretrained.main([*command, "--lr=1"])


@pytest.mark.parametrize("kind", ["encoder", "language"])
def test_sensitivities_are_measured_once_for_all_shares(kind, tmp_path, monkeypatch):
    """Those of one initialization, on held-out lines; of others nothing is run."""
    monkeypatch.setattr("benchmarks.tasks.Language.length", 16)
    folder = folder_of(tmp_path / "model", models(kind))
    texts = [f"--text={name}={text_of(tmp_path / name, k)}" for k, name in enumerate("ab")]
    command = [kind, folder, *texts, *SMALL, *SHORT, f"--out={tmp_path}", "--parts=compress"]
    command += ["--allocations=sensitivity"]
    asked, task = [], pretrained.TASKS[kind]
    real = task.quality

    def counted(self, model, name, part="test"):
        asked.append(part)
        return real(self, model, name, part)

    monkeypatch.setattr(task, "quality", counted)
    counts = []
    for shares in ("0.5", "0.5,0.7,0.3"):
        asked.clear()
        record = pretrained.main([
            *command, f"--shares={shares}", "--inits=calibrated:b", f"--name={len(shares)}"
        ])  # fmt: skip
        counts.append(asked.count("held"))
    assert counts[0] == counts[1] > 3
    kept = [cell["kept"] for key, cell in record["cells"].items() if key.startswith("compress")]
    assert kept == pytest.approx([0.5, 0.7, 0.3], abs=0.1)
    assert not any("spectral" in key for key in record["cells"])
    with pytest.raises(SystemExit, match="expected inits among"):
        pretrained.main([*command, "--inits=calibrated:c"])


@pytest.mark.parametrize("option", ["--device=cuda", "--json=record.json"])
def test_options_that_nothing_would_come_of_are_refused(option, capsys):
    """The models stay on the CPU, and the record has its place in --out."""
    with pytest.raises(SystemExit):
        pretrained.main(["encoder", "folder", "--text", "a=b", option])
    assert "unrecognized arguments" in capsys.readouterr().err


def pretrained_timing():
    """What timing gives, without the time."""
    from benchmarks.measure import Timing

    return Timing(1.0, 1.0, 1.0, 1)
