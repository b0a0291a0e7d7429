"""PEFT import against the real PEFT: what it wrote computes the same here; the rest is refused by name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import runs_helper
import safetensors.torch
import torch
from peft_kit import FP32, base_of, ids, packed, tiny
from torch import Tensor
from transformers import PreTrainedModel

from qtune.adapters import METHODS, adapted_sites
from qtune.cli import main
from qtune.errors import QtuneError
from qtune.peft import to_peft
from qtune.peft_import import read_peft, take_peft
from qtune.quant import Scheme, scheme_from
from qtune.recipe import Recipe
from qtune.runs import open_run
from qtune.screen import Screen

LLAMA, GPT2 = ["q_proj", "v_proj", "down_proj"], ["c_attn", "mlp.c_proj"]
LINEAR = {"target_modules": LLAMA}
FP32_KEYS = ["dtype=float32", "scheme.dtype=float32"]
CASES: dict[str, tuple[str, Callable[..., Any]]] = {
    "lora": ("llama", lambda: peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, **LINEAR)),
    "lora-rs": ("llama", lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **LINEAR)),
    "lora-conv1d": ("gpt2", lambda: peft.LoraConfig(r=4, target_modules=GPT2, fan_in_fan_out=True)),
    "lora-patterns": ("llama", lambda: peft.LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"v_proj": 7, r"^model.layers.1.*q_proj": 2}, alpha_pattern={"down_proj": 3},
        **LINEAR)),
    "lora-rs-patterns": ("llama", lambda: peft.LoraConfig(
        r=2, use_rslora=True, rank_pattern={"layers.1.mlp.down_proj": 5}, alpha_pattern={"v_proj": 3}, **LINEAR)),
    "lora-regex": ("llama", lambda: peft.LoraConfig(target_modules=r".*\.1\..*(q_proj|down_proj)", r=3)),
    "lora-one-layer": ("llama", lambda: peft.LoraConfig(target_modules=LLAMA, layers_to_transform=[1], r=3)),
    "lora-pattern-layer": ("llama", lambda: peft.LoraConfig(
        target_modules=LLAMA, layers_to_transform=0, layers_pattern="layers", r=3)),
    "lora-exclude": ("llama", lambda: peft.LoraConfig(target_modules=LLAMA, exclude_modules=["0.mlp.down_proj"])),
    "lora-all-linear": ("llama", lambda: peft.LoraConfig(target_modules="all-linear", r=2)),
    "dora": ("llama", lambda: peft.LoraConfig(r=4, lora_alpha=12, use_dora=True, **LINEAR)),
    "dora-conv1d": ("gpt2", lambda: peft.LoraConfig(
        r=4, use_dora=True, use_rslora=True, target_modules=GPT2, fan_in_fan_out=True)),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=10, **LINEAR)),
    "hira": ("llama", lambda: peft.HiraConfig(r=4, **LINEAR)),
    "hira-conv1d": ("gpt2", lambda: peft.HiraConfig(r=4, hira_dropout=0.1, target_modules=GPT2, fan_in_fan_out=True)),
    "hra": ("llama", lambda: peft.HRAConfig(r=4, **LINEAR)),
    "ia3": ("llama", lambda: peft.IA3Config(feedforward_modules=["down_proj"], **LINEAR)),
    "ia3-part-of-a-name": ("llama", lambda: peft.IA3Config(
        target_modules=[*LLAMA, "wn_proj"], feedforward_modules=["wn_proj"])),
    "ia3-regex": ("llama", lambda: peft.IA3Config(target_modules=".*(q|v)_proj", feedforward_modules=".*1.*v_proj")),
    "ia3-conv1d": ("gpt2", lambda: peft.IA3Config(
        target_modules=GPT2, feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
    "miss": ("llama", lambda: peft.MissConfig(r=8, miss_dropout=0.1, **LINEAR)),
    "vblora": ("llama", lambda: peft.VBLoRAConfig(r=3, num_vectors=20, vector_length=16, topk=3, **LINEAR)),
    "vera": ("llama", lambda: peft.VeraConfig(r=8, projection_prng_key=5, d_initial=0.3, **LINEAR)),
}  # fmt: skip


def random(model: PreTrainedModel, config: Any) -> Any:
    """A real PEFT model whose adapter is far from its start."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad and not name.endswith("ranknum.default"):
                p += 0.2 * torch.randn_like(p)
    return theirs


def pruned(theirs: Any) -> None:
    """What AdaLoRA's allocator leaves behind: a pattern of ranks, the rest zeros."""
    patterns = {}
    for place, (name, p) in enumerate((n, p) for n, p in theirs.base_model.model.named_parameters() if ".lora_E." in n):
        patterns[name] = [i != 2 and i != place % 6 for i in range(6)]
        p.data[[i for i, kept in enumerate(patterns[name]) if not kept]] = 0
    theirs.peft_config["default"].rank_pattern = patterns


def taken(folder: Path, family: str, scheme: Scheme = FP32) -> PreTrainedModel:
    ours = packed(tiny(family), scheme)
    take_peft(ours, read_peft(folder))
    return ours.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_what_peft_wrote_computes_the_same_here(name: str, tmp_path: Path) -> None:
    family, config = CASES[name]
    theirs = random(tiny(family), config())
    if name == "adalora":
        pruned(theirs)
    theirs.save_pretrained(tmp_path)
    ours = taken(tmp_path, family)
    want = theirs(ids()).logits
    torch.testing.assert_close(ours(ids()).logits, want, rtol=0, atol=1e-5)
    assert (want - tiny(family)(ids()).logits).abs().max() > 1e-2, "the adapter changes nothing"
    method = name.split("-")[0]
    assert {type(site.adapter) for site in adapted_sites(ours).values()} == {METHODS[method]}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_on_a_packed_base_too_and_back_again(name: str, tmp_path: Path) -> None:
    """Onto nf4, the reference being PEFT on the weights that the codes stand for; then out by our export."""
    family, config = CASES[name]
    base = packed(tiny(family), scheme_from("nf4"))
    theirs = random(base_of(base, family), config())
    theirs.save_pretrained(tmp_path / "theirs")
    spec, _ = take_peft(base, read_peft(tmp_path / "theirs"))
    want = theirs(ids()).logits
    torch.testing.assert_close(base.eval()(ids()).logits, want, rtol=0, atol=1e-5)
    to_peft(base, spec, tmp_path / "again", "someone/tiny")
    again = peft.PeftModel.from_pretrained(base_of(base, family), tmp_path / "again").eval()
    torch.testing.assert_close(again(ids()).logits, want, rtol=0, atol=1e-5)


def test_every_native_method_of_the_table_is_tried() -> None:
    native = {n for n, m in METHODS.items() if "peft" in vars(m) and m.peft is not None and m.peft.native}
    assert native == {name.split("-")[0] for name in CASES}


# ---- what cannot be taken in


def written(folder: Path, **changes: Any) -> Path:
    """A LoRA folder of PEFT's whose config is then changed."""
    random(tiny("llama"), peft.LoraConfig(r=4, **LINEAR)).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("changes", "words"), [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; qtune takes ADALORA, HIRA, HRA, IA3, LORA, MISS, VBLORA, VERA"),
    ({"peft_type": ["LORA"]}, "peft_type is"),
    ({"bias": "all", "lora_bias": True}, 'bias is "all"; lora_bias is true'),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \[\"lm_head\"\]"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is"),
    ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication is"),
    ({"use_qalora": True}, "use_qalora is true"),
    ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is"),
    ({"init_lora_weights": "pissa_niter_4"}, "changed the weights of the base.*path_initial_model"),
    ({"task_type": "SEQ_CLS"}, "task_type is"),
    ({"a_switch_of_the_future": True}, "a_switch_of_the_future is true"),
])  # fmt: skip
def test_settings_without_a_form_are_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(QtuneError, match=words) as caught:
        read_peft(written(tmp_path, **changes))
    assert caught.value.code == "Q418"


CONFIGS = [peft.LoraConfig, peft.AdaLoraConfig, peft.HiraConfig, peft.HRAConfig, peft.IA3Config, peft.MissConfig,
           peft.VBLoRAConfig, peft.VeraConfig]  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_setting_of_peft_is_known_or_refused(kind: Any, tmp_path: Path) -> None:
    """PEFT's defaults pass; and each setting that PEFT calls a switch (false or nothing by default) is either told of
    as harmless in one of our tables, or refused when it is on."""
    from qtune.peft_import import TOLD, _method_of

    extra = {"total_step": 10} if kind is peft.AdaLoraConfig else {}
    default = json.loads(json.dumps(kind(target_modules=["q_proj"], **extra).to_dict(), default=list))
    method = _method_of(default, tmp_path)
    assert method.peft is not None and method.method == default["peft_type"].lower()
    read = {*TOLD, *method.peft.options.values(), *method.peft.reads}
    for key, value in default.items():
        if key not in read and key not in ("use_dora",):
            with pytest.raises(QtuneError, match=f"{key} is "):
                _method_of(default | {key: not value if isinstance(value, bool) else ["x"]}, tmp_path)


def test_lora_on_the_embeddings_is_refused(tmp_path: Path) -> None:
    random(tiny("llama"), peft.LoraConfig(target_modules=["embed_tokens", "q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(QtuneError, match="holds base_model.model.model.embed_tokens"):
        read_peft(tmp_path)


def test_what_contradicts_the_base_is_one_error_and_leaves_the_model_alone(tmp_path: Path) -> None:
    found = read_peft(written(tmp_path, target_modules=["q_proj", "v_proj", "o_proj"]))
    model = packed(tiny("llama"))
    with pytest.raises(QtuneError) as caught:
        take_peft(model, found)
    text = str(caught.value)
    assert "model.layers.0.mlp.down_proj: in adapter_model.safetensors, but target_modules leaves it out" in text
    assert "model.layers.1.self_attn.o_proj: target_modules asks for it" in text
    assert not adapted_sites(model) and any(p.requires_grad for p in model.parameters())


# ---- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_helper.write_model(tmp_path_factory.mktemp("base"))


def model_at(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens() -> Tensor:
    return torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora-patterns", "vera", "adalora"])
def test_the_command_writes_a_run(name: str, checkpoint: Path, tmp_path: Path) -> None:
    theirs = random(model_at(checkpoint), CASES[name][1]())
    theirs.save_pretrained(tmp_path / "theirs")
    out = tmp_path / "run"
    argv = ["import", str(tmp_path / "theirs"), "--out", str(out), "--scheme", "dense", *FP32_KEYS, "--json"]
    assert main(argv) == 0  # the base is the one that PEFT names
    run = open_run(out, Screen(quiet=True))
    torch.testing.assert_close(run.model(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-5)
    assert Recipe.load(out / "recipe.yaml", training=False).adapter == run.recipe.adapter
    again = ["import", str(tmp_path / "theirs"), "--out", str(out), "--json"]
    assert main(again) == 1  # it is there


def test_training_goes_on_from_it(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random(model_at(checkpoint), peft.LoraConfig(r=4, **LINEAR)).save_pretrained(tmp_path / "theirs")
    out = tmp_path / "run"
    argv = ["import", str(tmp_path / "theirs"), "--base", str(checkpoint), "--out", str(out), "--json"]
    assert main(argv) == 0
    data, new = runs_helper.write_task(tmp_path), tmp_path / "new"
    printed = re.search("qtune (train .*)", capsys.readouterr().err)
    assert printed
    asked = shlex.split(printed[1].replace("FILE", str(data)).replace("FOLDER", str(new)))
    assert main([*asked, "train.steps=2", "train.report=false", "--json"]) == 0
    taken, trained = (safetensors.torch.load_file(folder / "adapter.safetensors") for folder in (out, new))
    assert taken.keys() == trained.keys() and any(not torch.equal(taken[n], trained[n]) for n in taken)
    assert main(["merge", str(out), "--dtype", "float32", "--json"]) == 0


def test_another_base_than_peft_names_is_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random(model_at(checkpoint), peft.LoraConfig(r=4, **LINEAR)).save_pretrained(tmp_path / "theirs")
    shutil.copytree(checkpoint, tmp_path / "copy")
    monkeypatch.chdir(checkpoint.parent)
    for base, told in ((checkpoint.name, False), (str(tmp_path / "copy"), True)):
        out = tmp_path / f"run-{told}"
        assert main(["import", str(tmp_path / "theirs"), "--base", base, "--out", str(out), "--json"]) == 0
        assert ("PEFT trained it on" in capsys.readouterr().err) is told


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_come_in(tied: bool, tmp_path: Path) -> None:
    checkpoint = runs_helper.write_model(tmp_path / "base", "llama-tied" if tied else "llama")
    rows = {"embed_tokens": [70, 9]} | ({} if tied else {"lm_head": [70, 9]})
    config = peft.LoraConfig(r=4, trainable_token_indices=rows, **LINEAR)
    theirs = random(model_at(checkpoint), config)
    theirs.save_pretrained(tmp_path / "theirs")
    out = tmp_path / "run"
    argv = ["import", str(tmp_path / "theirs"), "--out", str(out), "--scheme", "dense", *FP32_KEYS, "--json"]
    assert main(argv) == 0
    run = open_run(out, Screen(quiet=True))
    some = torch.cat((tokens(), torch.tensor([[70, 9], [9, 9]])), 1)
    torch.testing.assert_close(run.model(some).logits, theirs(some).logits, rtol=0, atol=1e-5)
    assert run.recipe.tokens.train == ("w66", "w5") and not run.recipe.tokens.add


def test_new_tokens_go_out_and_come_in(tmp_path: Path) -> None:
    keys = {"tokens__add": ["<new>", "<other>"], "tokens__special": True, "train__steps": 2}
    recipe = runs_helper.recipe(tmp_path, **keys)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["train", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--json"]) == 0
    argv = ["import", str(tmp_path / "out"), "--out", str(tmp_path / "again"), "dtype=float32", "scheme.block=32"]
    assert main([*argv, "--json"]) == 0
    ours, again = (open_run(tmp_path / name, Screen(quiet=True)) for name in ("run", "again"))
    some = torch.cat((tokens(), torch.tensor([[131, 132], [132, 132]])), 1)
    torch.testing.assert_close(ours.model(some).logits, again.model(some).logits, rtol=0, atol=1e-6)
    assert again.recipe.tokens == recipe.tokens
