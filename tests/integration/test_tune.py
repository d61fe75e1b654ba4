"""Tuning jobs as a whole: the same adapter however it came about, and one that anybody's PEFT can load."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mesh.errors import ConfigError
from node.compute.adapters.card import digest_of, read_card
from node.compute.features.maps import MissingFeaturesError
from node.compute.features.store import LocalStore
from tests.tiny import tiny_llama
from tests.tuning import (
    chat_lines,
    class_lines,
    completion_lines,
    job,
    memory,
    run,
    source,
    spec,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def digest(model: Path, work: Path, wish: Any, **changes: Any) -> str:
    tuning = job(model, work, wish, **changes)
    run(tuning)
    assert tuning.result is not None
    return tuning.result.digest


# ── one digest ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("codec", "error"), [("raw", 0.0), ("int8", 0.06), ("int4", 0.5)])
def test_cached_uncached_and_top_only_training_give_one_digest(
    codec: str, error: float, model: Path, tmp_path: Path
) -> None:
    wish = spec(feature_error=error, eval_data=class_lines(12, seed=9))

    def maps(store: Any, holds_all: bool = True) -> Any:
        whole = source(model, store, holds_all=holds_all)
        return lambda cut, **asked: whole(cut, **{**asked, "codec": codec})

    kept = LocalStore(tmp_path / "features", 1 << 24, 1 << 26)
    first = digest(model, tmp_path / "1", wish, maps_factory=maps(kept))
    cached = job(model, tmp_path / "2", wish, maps_factory=maps(kept))
    run(cached)
    assert cached.progress.cache_misses == 0, "an adapter on the same data computes no feature map"
    uncached = digest(model, tmp_path / "3", wish, maps_factory=maps(LocalStore(None, 0, 0)))
    from_disk = maps(LocalStore(tmp_path / "features", 0, 1 << 26), holds_all=False)
    top_only = digest(model, tmp_path / "4", wish, maps_factory=from_disk)
    assert cached.result is not None
    assert {first, cached.result.digest, uncached, top_only} == {first}


def test_a_job_says_what_features_it_read_and_where_it_had_them_from(model: Path, tmp_path: Path) -> None:
    kept = LocalStore(tmp_path / "features", 1 << 24, 1 << 26)
    first = job(model, tmp_path / "1", spec(seed=1), maps_factory=source(model, kept))
    second = job(model, tmp_path / "2", spec(seed=2), maps_factory=source(model, kept))
    run(first)
    run(second)
    one, two = first.held, second.held
    assert one is not None and two is not None
    assert one.n_computed == one.n_tokens == two.n_found and one.n_found == two.n_computed == 0
    assert one.sample_keys == two.sample_keys and 1 <= len(one.sample_keys) <= 32
    entries = kept.get([bytes.fromhex(key) for key in one.sample_keys])
    assert all(entry is not None for entry in entries)
    rows = sum(entry.encoded.n for entry in entries if entry)
    mean_bytes = sum(entry.encoded.n_bytes for entry in entries if entry) / rows
    assert one.n_bytes == pytest.approx(mean_bytes * one.n_tokens, rel=0.1)


def test_another_codec_is_another_adapter(model: Path, tmp_path: Path) -> None:
    def with_codec(codec: str) -> str:
        whole = source(model, memory())
        return digest(
            model,
            tmp_path / codec,
            spec(feature_error=0.5),
            maps_factory=lambda cut, **asked: whole(cut, **{**asked, "codec": codec}),
        )

    assert len({with_codec("raw"), with_codec("int8"), with_codec("int4")}) == 3


def test_a_top_only_node_says_what_to_do_when_features_are_missing(model: Path, tmp_path: Path) -> None:
    nothing = source(model, memory(), holds_all=False)
    with pytest.raises(MissingFeaturesError, match="run the task on a node with the whole model"):
        run(job(model, tmp_path, spec(), maps_factory=nothing))


def test_the_seed_is_the_only_chance(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = digest(model, tmp_path / "1", spec(seed=1))
    torch.manual_seed(2)
    torch.rand(7)
    same = digest(model, tmp_path / "2", spec(seed=1))
    other = digest(model, tmp_path / "3", spec(seed=2))
    assert one == same != other


def test_inline_records_and_a_file_of_them_are_the_same_task(model: Path, tmp_path: Path) -> None:
    content = class_lines().encode()
    name = hashlib.sha256(content).hexdigest()
    (tmp_path / f"{name}.jsonl").write_bytes(content)
    inline = digest(model, tmp_path / "1", spec())
    wish = spec(data=None, data_sha256=name, holders=["n1"])
    assert digest(model, tmp_path / "2", wish, datasets_dir=tmp_path) == inline
    (tmp_path / f"{name}.jsonl").write_bytes(content + b"\n")
    with pytest.raises(ConfigError, match="is damaged"):
        run(job(model, tmp_path / "3", wish, datasets_dir=tmp_path))
    with pytest.raises(ConfigError, match="is not on this node"):
        run(job(model, tmp_path / "3", wish, datasets_dir=tmp_path / "elsewhere"))


# ── going on ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["lora", "dora", "oft", "vera", "ln_tuning", "alora"])
def test_methods_of_every_kind_go_on_to_the_same_bits_after_being_dropped_anywhere(
    method: str, model: Path, tmp_path: Path
) -> None:
    task = "chat" if method == "alora" else "classify"
    lines = chat_lines(24) if task == "chat" else class_lines(24)
    wish = spec(task=task, method=method, data=lines, eval_data=lines, epochs=2)
    whole = digest(model, tmp_path / "1", wish)
    for stop_after in (9, 14, 19, 100_000):
        tuning = job(model, tmp_path / "2", wish, checkpoint_steps=1)
        for _ in range(stop_after):
            if tuning.step().is_done:
                break
    assert tuning.result is not None
    assert tuning.result.digest == whole


def test_a_killed_process_goes_on_to_the_same_bits(model: Path, tmp_path: Path) -> None:
    """``kill -9`` in the middle of a step, as far as anybody can tell; then the rest."""
    wish = spec(epochs=6, data=class_lines(40))
    whole = digest(model, tmp_path / "1", wish)
    code = (
        "import sys, time; from pathlib import Path; from tests.tuning import *\n"
        "tuning = job(Path(sys.argv[1]), Path(sys.argv[2]), spec(epochs=6, data=class_lines(40)),"
        " checkpoint_steps=2)\n"
        "while not (event := tuning.step()).is_done:\n"
        "    print(event.progress.step, flush=True)\n"
        "print('digest', tuning.result.digest, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    reached = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            reached = int(line)
            if reached >= 17:
                child.send_signal(signal.SIGKILL)
                break
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert f"digest {whole}" in done.stdout, done.stderr
    resumed_at = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert next(step for step in resumed_at if step) > 10, "it went on, and did not start over"
    assert not list((tmp_path / "2" / "checkpoints").iterdir()), "a finished job leaves no checkpoint"


def test_a_torn_checkpoint_falls_back_to_the_one_before(model: Path, tmp_path: Path) -> None:
    wish = spec(epochs=3)
    whole = digest(model, tmp_path / "1", wish)
    tuning = job(model, tmp_path / "2", wish, checkpoint_steps=1)
    while tuning.step().progress.step < 9:
        pass
    files = sorted(
        (tmp_path / "2" / "checkpoints").glob("*/*.safetensors"), key=lambda p: p.stat().st_mtime_ns
    )
    assert len(files) == 2
    files[1].write_bytes(files[1].read_bytes()[:-40])
    again = job(model, tmp_path / "2", wish)
    texts = [event.text for event in run(again)]
    assert any("going on after step 8" in text for text in texts)
    assert again.result is not None and again.result.digest == whole


def test_checkpoints_that_are_all_damaged_mean_starting_over(model: Path, tmp_path: Path) -> None:
    wish = spec(epochs=3)
    whole = digest(model, tmp_path / "1", wish)
    tuning = job(model, tmp_path / "2", wish, checkpoint_steps=1)
    while tuning.step().progress.step < 5:
        pass
    for file in (tmp_path / "2" / "checkpoints").glob("*/*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert digest(model, tmp_path / "2", wish) == whole


def test_a_chosen_number_of_layers_is_not_chosen_again(model: Path, tmp_path: Path) -> None:
    wish = spec(top_layers=None, epochs=3)
    tuning = job(model, tmp_path, wish, checkpoint_steps=1)
    events = []
    while not events or events[-1].progress.step < 4:
        events.append(tuning.step())
    assert any(event.progress.phase == "choosing" for event in events)
    chosen = events[-1].progress.text
    again = job(model, tmp_path, wish, deadline_s=0.001)
    rest = run(again)
    assert not any(event.progress.phase == "choosing" for event in rest)
    assert rest[-1].progress.text == chosen


def test_an_adapter_trained_before_is_not_trained_again(model: Path, tmp_path: Path) -> None:
    first = digest(model, tmp_path, spec())
    again = job(model, tmp_path, spec())
    assert len(run(again)) <= 3
    assert again.result is not None and again.result.digest == first
    (tmp_path / "shelf" / "a" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert digest(model, tmp_path, spec()) == first


# ── what comes out ──────────────────────────────────────────────────────────────────────────────────


def test_a_classifier_loads_in_plain_transformers_and_peft(model: Path, tmp_path: Path) -> None:
    wish = spec(data=class_lines(60), eval_data=class_lines(30, seed=4), epochs=4)
    tuning = job(model, tmp_path, wish)
    run(tuning)
    path = tmp_path / "shelf" / "a"
    card = read_card(path)
    assert (
        card is not None
        and card.digest == digest_of(path)
        and card.labels == ("class 0", "class 1", "class 2")
    )
    assert (card.first_layer, card.top_layers, card.task, card.method) == (3, 2, "classify", "lora")
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    loaded = peft.PeftModel.from_pretrained(plain, path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    right = 0
    lines = [json.loads(line) for line in class_lines(30, seed=4).splitlines()]
    with torch.no_grad():
        for line in lines:
            logits = loaded(torch.tensor([tokenizer.encode(line["text"])])).logits[0]
            right += card.labels[int(logits.argmax())] == line["label"]
    assert card.metric == pytest.approx(right / len(lines)), "the metric is what others measure, too"


@pytest.mark.parametrize(("task", "lines"), [("complete", completion_lines()), ("chat", chat_lines())])
def test_a_language_adapter_has_the_loss_that_plain_peft_measures(
    task: str, lines: str, model: Path, tmp_path: Path
) -> None:
    tuning = job(model, tmp_path, spec(task=task, data=lines, eval_data=lines, epochs=3))
    run(tuning)
    assert tuning.result is not None and tuning.result.metric is not None
    plain = AutoModelForCausalLM.from_pretrained(model)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "shelf" / "a").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    losses = []
    for line in map(json.loads, lines.splitlines()):
        if task == "complete":
            before = tokenizer.encode(line["prompt"])
            whole = [*before, *tokenizer.encode(line["completion"]), tokenizer.eos_token_id]
        else:
            template = tokenizer.apply_chat_template
            before = template(line["messages"][:1], add_generation_prompt=True, return_dict=True)["input_ids"]
            whole = template(line["messages"], return_dict=True)["input_ids"]
        labels = [-100] * len(before) + whole[len(before) :]
        with torch.no_grad():
            logits = loaded(torch.tensor([whole])).logits[0, :-1]
        kept = torch.tensor(labels[1:]) != -100
        losses.append(
            torch.nn.functional.cross_entropy(logits[kept], torch.tensor(whole[1:])[kept], reduction="none")
        )
    assert tuning.result.metric == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)


def test_the_adapter_appears_whole_or_not_at_all(model: Path, tmp_path: Path) -> None:
    digest(model, tmp_path, spec())
    tuning = job(model, tmp_path, spec(seed=5))
    shelf = tmp_path / "shelf"
    done = False
    while not done:
        done = tuning.step().is_done
        assert [path.name for path in shelf.iterdir() if not path.name.startswith(".")] == ["a"]
        assert digest_of(shelf / "a")
    assert sorted(path.name for path in shelf.iterdir()) == ["a"], "nothing is left beside it"


def test_learning_works_above_the_cut(model: Path, tmp_path: Path) -> None:
    data = completion_lines(40)
    wish = spec(task="complete", data=data, eval_data=data, epochs=12, learning_rate=1e-2)
    tuning = job(model, tmp_path, wish)
    metrics = [event.progress.metric for event in run(tuning) if event.progress.metric is not None]
    assert metrics[-1] < 0.8 * metrics[0]


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────


def test_too_little_memory_is_refused_with_the_numbers_before_anything_is_computed(
    model: Path, tmp_path: Path
) -> None:
    tuning = job(model, tmp_path, spec(), memory_free=lambda: 5_000_000)
    with pytest.raises(ConfigError, match=r"needs about \d+ MB and 5 MB are free"):
        run(tuning)
    assert tuning.progress.cache_misses == 0


def test_a_loss_that_is_no_number_ends_the_job_with_advice(model: Path, tmp_path: Path) -> None:
    wish = spec(task="complete", data=completion_lines(), learning_rate=1e30, epochs=20)
    with pytest.raises(ConfigError, match="Choose a smaller --learning-rate"):
        run(job(model, tmp_path, wish))


def test_records_with_nothing_to_learn_within_max_tokens_are_named(model: Path, tmp_path: Path) -> None:
    long = json.dumps({"prompt": "w1 " * 30, "completion": "w2"})
    data = completion_lines(8) + "\n" + long
    with pytest.raises(ConfigError, match="line 9: within 16 tokens there is no answer"):
        run(job(model, tmp_path, spec(task="complete", data=data, max_tokens=16)))
    run(job(model, tmp_path, spec(task="complete", data=data, max_tokens=16, skip_bad=True)))


# ── the real model ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.model
def test_smollm2_is_tuned_from_features_that_a_second_adapter_finds(
    model_directory: Path, tmp_path: Path
) -> None:
    topics = {"food": "Bake the bread with salt and oil", "sport": "The team won the match at home"}
    lines = [
        json.dumps({"text": f"{text}, {number}", "label": topic})
        for number in range(6)
        for topic, text in topics.items()
    ]
    wish = {"data": "\n".join(lines), "eval_data": "\n".join(lines), "top_layers": 1, "epochs": 2}
    features = source(model_directory, memory())
    first = job(model_directory, tmp_path, spec(**wish), maps_factory=features)
    run(first)
    second = job(model_directory, tmp_path, spec(**wish, adapter="b", seed=3), maps_factory=features)
    run(second)
    assert first.result is not None and first.result.metric == 1.0
    assert first.progress.cache_misses == 12 and second.progress.cache_misses == 0
    plain = AutoModelForSequenceClassification.from_pretrained(model_directory, num_labels=2)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "shelf" / "a").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    for topic, text in topics.items():
        with torch.no_grad():
            logits = loaded(torch.tensor([tokenizer.encode(f"{text}, 0")])).logits[0]
        assert first.result.labels[int(logits.argmax())] == topic
