"""Adapters as PEFT writes them, served by our pass, held against plain transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from node.compute.adapters.card import Card, digest_of, write_card
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.files import load_adapter
from node.compute.adapters.shelf import Shelf
from node.compute.backbone.contract import Segment
from node.compute.backbone.deltas import Adapter, Delta, Up
from node.compute.backbone.load import load_backbone
from tests.reference.made_adapters import N_LAYERS, VOCABULARY, make_adapter, make_model, peft_logits

QV = ["q_proj", "v_proj"]
ALL = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP = {"layers_to_transform": [3, 4], "layers_pattern": "layers"}
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12}

METHODS: dict[str, tuple[Any, int]] = {
    "lora on q and v": (peft.LoraConfig(**LORA, target_modules=QV), 0),
    "lora on every linear module of the top": (peft.LoraConfig(**LORA, target_modules=ALL, **TOP), 3),
    "lora by a regular expression": (
        peft.LoraConfig(**LORA, target_modules=r".*layers\.[24]\.mlp\.(up|down)_proj"),
        2,
    ),
    "lora with ranks and alphas by pattern": (
        peft.LoraConfig(
            **LORA,
            target_modules=ALL,
            rank_pattern={"q_proj": 1, r"layers\.3\.mlp\.up_proj": 17},
            alpha_pattern={"v_proj": 3, "down_proj": 40},
        ),
        0,
    ),
    "rslora": (peft.LoraConfig(**LORA, target_modules=ALL, use_rslora=True, **TOP), 3),
    "dora": (peft.LoraConfig(**LORA, target_modules=ALL, use_dora=True, **TOP), 3),
    "lora with trained biases": (peft.LoraConfig(**LORA, target_modules=ALL, bias="all"), 0),
    "dora with trained biases": (
        peft.LoraConfig(**LORA, target_modules=QV, bias="lora_only", use_dora=True),
        0,
    ),
    "lora with a bias of B": (peft.LoraConfig(**LORA, target_modules=ALL, lora_bias=True), 0),
    "lora on the head": (peft.LoraConfig(**LORA, target_modules=["lm_head"]), N_LAYERS),
    "lora with a whole module saved": (
        peft.LoraConfig(**LORA, target_modules=QV, modules_to_save=["down_proj", "input_layernorm"], **TOP),
        0,
    ),
    "adalora": (
        peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=ALL, init_r=6, total_step=10, lora_alpha=24),
        0,
    ),
    "ia3": (
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        0,
    ),
    "ia3 on the input of one of several": (
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["v_proj", "up_proj"], feedforward_modules=["up_proj"]
        ),
        0,
    ),
    "loha": (peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=ALL, r=4, alpha=8, **TOP), 3),
    "lokr": (peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=ALL, r=4, alpha=8, **TOP), 3),
    "oft": (peft.OFTConfig(task_type="CAUSAL_LM", target_modules=ALL, oft_block_size=8, r=0, **TOP), 3),
    "boft": (peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=ALL, boft_block_size=8, **TOP), 3),
    "hra": (peft.HRAConfig(task_type="CAUSAL_LM", target_modules=ALL, r=4, **TOP), 3),
    "vera": (peft.VeraConfig(task_type="CAUSAL_LM", target_modules=ALL, r=16, **TOP), 3),
    "vera without its projections": (
        peft.VeraConfig(task_type="CAUSAL_LM", target_modules=QV, r=16, save_projection=False, **TOP),
        3,
    ),
    "fourierft": (
        peft.FourierFTConfig(task_type="CAUSAL_LM", target_modules=ALL, n_frequency=50, scaling=20.0, **TOP),
        3,
    ),
    "ln_tuning": (
        peft.LNTuningConfig(
            task_type="CAUSAL_LM", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]
        ),
        0,
    ),
    "ln_tuning of the final norm": (
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["model.norm"]),
        N_LAYERS,
    ),
}
"""Kind -> PEFT's configuration, and the first layer it changes."""


WITH_BIASES = (
    "lora on q and v",
    "lora with trained biases",
    "dora",
    "dora with trained biases",
    "lora with a bias of B",
    "ia3",
    "loha",
    "lora on the head",
)
"""What has to mind the frozen biases, which Qwen2 has."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen2"), "qwen2")


def token_ids(n: int, seed: int = 5) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()
    return ids


def our_logits(backbone: Any, adapter: Any, ids: list[int], piece: int = 7) -> torch.Tensor:
    """Every position's, in pieces: prompts and single tokens both occur."""
    states, found = backbone.states(len(ids)), []
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        rows = backbone.forward([Segment(states, part, adapter, n_wanted=len(part))]).rows
        found.append(backbone.logits(rows, [adapter] * len(part)))
    return torch.cat(found)


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in METHODS), *(("qwen2", kind) for kind in WITH_BIASES)]
)
def test_every_kind_gives_the_logits_of_transformers_and_peft(
    family: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(family)
    config, first_layer = METHODS[kind]
    directory = make_adapter(tmp_path / "a", model, config)
    adapter = load_adapter(directory, BackboneFacts.of(model))
    ids = token_ids(22)
    expected, base = peft_logits(model, directory, ids), peft_logits(model, None, ids)
    ours = our_logits(load_backbone(model), adapter, ids)
    assert difference(base, expected) > 3e-3, "an adapter without effect would prove nothing"
    assert difference(ours, expected) <= 1e-4
    assert adapter.first_layer == first_layer


class TestActivated:
    """PEFT's activated LoRA: what stands before the invocation is everybody's."""

    TOKENS: ClassVar = [7, 8]

    @pytest.fixture(scope="class")
    def directory(self, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        config = peft.LoraConfig(**LORA, target_modules=QV, alora_invocation_tokens=self.TOKENS)
        return make_adapter(tmp_path_factory.mktemp("alora") / "a", llama, config, size=0.3)

    def test_gives_the_logits_of_peft_and_shares_its_prefix(self, llama: Path, directory: Path) -> None:
        ids = [*token_ids(9), *self.TOKENS, *token_ids(4, 6), *self.TOKENS, *token_ids(8, 7)]
        backbone, adapter = load_backbone(llama), load_adapter(directory, BackboneFacts.of(llama))
        start = adapter.active_from(ids)
        assert start == 15
        states, plain = backbone.states(len(ids)), backbone.states(len(ids))
        parts = [Segment(states, ids[:start], n_wanted=start)]
        rows = [backbone.forward(parts).rows]
        rows.append(backbone.forward([Segment(states, ids[start:], adapter, n_wanted=len(ids) - start)]).rows)
        ours = backbone.logits(torch.cat(rows))
        expected = peft_logits(llama, directory, ids)
        assert difference(ours, expected) <= 1e-4
        assert difference(peft_logits(llama, None, ids)[start:], expected[start:]) > 1e-2
        backbone.forward([Segment(plain, ids[:start])])
        for mine, base in zip(states.block(0, start, N_LAYERS), plain.block(0, start, N_LAYERS), strict=True):
            assert torch.equal(mine, base)

    def test_stays_off_where_the_prompt_does_not_call_it(self, llama: Path, directory: Path) -> None:
        ids = [1, 2, 3, 8, 7]
        adapter = load_adapter(directory, BackboneFacts.of(llama))
        assert adapter.active_from(ids) == len(ids)
        assert torch.equal(peft_logits(llama, directory, ids), peft_logits(llama, None, ids))


class TestClassifiers:
    @pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
    def test_give_the_logits_of_transformers_and_peft(self, kind: str, llama: Path, tmp_path: Path) -> None:
        common: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        config = {
            "lora": lambda: peft.LoraConfig(**common, r=4, target_modules=ALL, **TOP),
            "dora": lambda: peft.LoraConfig(**common, r=4, target_modules=ALL, use_dora=True),
            "ia3": lambda: peft.IA3Config(**common, target_modules=["k_proj"], feedforward_modules=[]),
        }[kind]()
        directory = make_adapter(tmp_path / "a", llama, config, n_labels=3)
        adapter = load_adapter(directory, BackboneFacts.of(llama))
        assert adapter.head is not None and adapter.head.labels == ("0", "1", "2")
        backbone, ids = load_backbone(llama), token_ids(19)
        rows = backbone.forward([Segment(backbone.states(19), ids, adapter)]).rows
        assert (
            difference(adapter.head.logits(rows)[0], peft_logits(llama, directory, ids, n_labels=3)) <= 1e-4
        )

    def test_labels_have_the_names_of_the_card(self, llama: Path, tmp_path: Path) -> None:
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=QV, modules_to_save=["score"])
        directory = make_adapter(tmp_path / "a", llama, config, n_labels=2)
        card = Card(
            name="a", digest=digest_of(directory), method="lora", task="classify", first_layer=0,
            top_layers=N_LAYERS, labels=("no", "yes"),
        )  # fmt: skip
        write_card(directory, card)
        head = load_adapter(directory, BackboneFacts.of(llama)).head
        assert head is not None and head.labels == ("no", "yes")


@pytest.fixture(scope="module")
def many(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Adapters of several kinds, cuts and ranks, and none."""
    kinds = [
        "lora on q and v", "lora with ranks and alphas by pattern", "dora", "ia3", "lokr", "ln_tuning",
        "lora on the head", "lora on every linear module of the top", "vera",
    ]  # fmt: skip
    shelf = tmp_path_factory.mktemp("many")
    facts = BackboneFacts.of(llama)
    found: list[Any] = [None]
    for at, kind in enumerate([*kinds, "lora on q and v"]):
        directory = make_adapter(shelf / f"a{at}", llama, METHODS[kind][0], seed=at, size=0.3)
        found.append(load_adapter(directory, facts))
    return found


class Sequence:
    """Greedy decoding by hand: a prompt, then one token after another."""

    def __init__(self, backbone: Any, adapter: Any, prompt: list[int]) -> None:
        self.states, self.adapter = backbone.states(128), adapter
        self.next, self.tokens = prompt, list[int]()

    def segment(self) -> Segment:
        return Segment(self.states, self.next, self.adapter)

    def take(self, logits: torch.Tensor) -> None:
        self.tokens.append(int(logits.argmax()))
        self.next = self.tokens[-1:]


def step(backbone: Any, sequences: list[Sequence]) -> torch.Tensor:
    rows = backbone.forward([sequence.segment() for sequence in sequences]).rows
    logits: torch.Tensor = backbone.logits(rows, [sequence.adapter for sequence in sequences])
    for sequence, mine in zip(sequences, logits, strict=True):
        sequence.take(mine)
    return logits


def alone(backbone: Any, adapter: Any, prompt: list[int], n: int) -> list[int]:
    sequence = Sequence(backbone, adapter, prompt)
    for _ in range(n):
        step(backbone, [sequence])
    return sequence.tokens


class TestManyAtOnce:
    def test_each_answer_is_that_of_its_adapter_alone(self, llama: Path, many: list[Any]) -> None:
        """Prompts and single tokens, several kinds, some adapters twice, in one pass."""
        backbone = load_backbone(llama)
        mix = [*many, *many[1:5], None]
        prompts = [token_ids(3 + 2 * at, at) for at in range(len(mix))]
        sequences = [Sequence(backbone, a, p) for a, p in zip(mix, prompts, strict=True)]
        for _ in range(8):
            step(backbone, sequences)
        for sequence, adapter, prompt in zip(sequences, mix, prompts, strict=True):
            assert sequence.tokens == alone(backbone, adapter, prompt, 8)
        assert len({tuple(sequence.tokens) for sequence in sequences}) > 10

    def test_sequences_join_and_leave_without_a_trace(self, llama: Path, many: list[Any]) -> None:
        backbone = load_backbone(llama)
        prompts = [token_ids(4 + at, at) for at in range(len(many))]
        sequences = [Sequence(backbone, a, p) for a, p in zip(many, prompts, strict=True)]
        for now in range(10 + len(many)):
            running = [s for at, s in enumerate(sequences) if at <= now and len(s.tokens) < 8]
            step(backbone, running[::-1] if now % 2 else running)
        for sequence, adapter, prompt in zip(sequences, many, prompts, strict=True):
            assert sequence.tokens == alone(backbone, adapter, prompt, 8)

    def test_equal_prompts_of_two_adapters_never_see_each_others_state(
        self, llama: Path, many: list[Any]
    ) -> None:
        """What llama.cpp #26207 gets wrong: the second answers from the first one's states."""
        backbone, prompt = load_backbone(llama), token_ids(16)
        pairs = [Sequence(backbone, many[1], prompt), Sequence(backbone, many[10], prompt)]
        base = Sequence(backbone, None, prompt)
        for _ in range(8):
            step(backbone, [*pairs, base])
        answers = [alone(load_backbone(llama), adapter, prompt, 8) for adapter in (many[1], many[10], None)]
        assert [s.tokens for s in (*pairs, base)] == answers
        states = [s.states.block(0, 16, N_LAYERS)[1] for s in (*pairs, base)]
        assert not torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])

    def test_a_replaced_adapter_finishes_what_it_began(
        self, llama: Path, many: list[Any], tmp_path: Path
    ) -> None:
        backbone, prompt = load_backbone(llama), token_ids(10)
        for seed in (1, 2):
            made = make_adapter(tmp_path / f"v{seed}", llama, METHODS["dora"][0], seed=seed, size=0.3)
            made.rename(tmp_path / f"version{seed}")
        (tmp_path / "shelf").mkdir()
        (tmp_path / "version1").rename(tmp_path / "shelf" / "a")
        shelf = Shelf(tmp_path / "shelf", BackboneFacts.of(llama), 1 << 30)
        old = Sequence(backbone, shelf.pin("a"), prompt)
        step(backbone, [old])
        (tmp_path / "shelf" / "a").rename(tmp_path / "gone")
        (tmp_path / "version2").rename(tmp_path / "shelf" / "a")
        new = Sequence(backbone, shelf.pin("a"), prompt)
        for _ in range(7):
            step(backbone, [old, new])
        assert old.tokens == alone(backbone, old.adapter, prompt, 8)
        assert new.tokens == alone(backbone, new.adapter, prompt, 7) != old.tokens[:7]

    def test_rows_that_enter_at_the_cut_give_the_same_answer(self, llama: Path, many: list[Any]) -> None:
        backbone, ids = load_backbone(llama), token_ids(20)
        adapter = next(a for a in many if a is not None and a.first_layer == 3)
        whole = our_logits(backbone, adapter, ids, piece=20)
        states = backbone.states(20)
        features = backbone.features([Segment(states, ids)], 3)
        states.length = 0
        rows = backbone.forward([Segment(states, ids, adapter, hidden=features, enters=3, n_wanted=20)]).rows
        assert difference(backbone.logits(rows), whole) <= 1e-5

    def test_features_above_an_adapters_first_layer_are_refused(self, llama: Path, many: list[Any]) -> None:
        backbone = load_backbone(llama)
        adapter = next(a for a in many if a is not None and a.first_layer == 3)
        segment = Segment(backbone.states(4), [1, 2], adapter, hidden=torch.zeros(2, 64), enters=4)
        with pytest.raises(AssertionError, match="above its first layer"):
            backbone.forward([segment])


REAL_PROMPTS = [
    "The capital of France is", "Once upon a time, in a village by the sea,", "def fibonacci(n):",
    "To bake bread you need",
]  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_on_real_texts_four_adapters_at_once_answer_as_each_alone(
    precision: str, model_directory: Path
) -> None:
    """Greedy, token for token: whoever shares the pass may move the last bits of a logit, not the token."""
    backbone: Any = load_backbone(model_directory, "cpu", precision)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    prompts = [tokenizer(text).input_ids for text in REAL_PROMPTS]
    adapters = [random_lora(f"a{at}", backbone, seed=at) for at in range(len(prompts))]
    sequences = [Sequence(backbone, a, p) for a, p in zip(adapters, prompts, strict=True)]
    for _ in range(10):
        step(backbone, sequences)
    for sequence, adapter, prompt in zip(sequences, adapters, prompts, strict=True):
        assert sequence.tokens == alone(backbone, adapter, prompt, 10)
    assert sequences[0].tokens != alone(backbone, None, prompts[0], 10), "they must change something"


def random_lora(name: str, backbone: Any, seed: int, rank: int = 8) -> Adapter:
    """On q and v of all layers, large enough to change answers."""
    g = torch.Generator().manual_seed(seed)
    d, q, kv = backbone.width, 576, 192

    def delta() -> Delta:
        a = torch.randn(2 * rank, d, generator=g) / d**0.5
        return Delta(
            a,
            (
                Up(0, torch.randn(q, rank, generator=g) * 0.3),
                Up(q + kv, torch.randn(kv, rank, generator=g) * 0.1),
            ),
        )

    deltas = {(layer, "qkv"): delta() for layer in range(backbone.n_layers)}
    return Adapter(name, 0, 0, deltas, n_layers=backbone.n_layers)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_adalora_after_its_ranks_were_pruned(llama: Path, tmp_path: Path) -> None:
    """PEFT keeps dividing by the rank it started from."""
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=QV, init_r=6, target_r=3, total_step=30, tinit=2, tfinal=10,
        deltaT=1, lora_alpha=30,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ids = torch.tensor([token_ids(24)])
        for at in range(31):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(at)
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", BackboneFacts.of(llama))
    assert {up.b.shape[1] for delta in adapter.deltas.values() for up in delta.ups} != {6}
    expected = peft_logits(llama, tmp_path / "a", token_ids(22))
    assert difference(our_logits(load_backbone(llama), adapter, token_ids(22)), expected) <= 1e-4
