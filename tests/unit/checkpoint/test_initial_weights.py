"""Starting from the weights in a folder of torch.distributed.checkpoint: strict, by name, in this process alone."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from mmrl_core.checkpoint.dcp_reading import _MetadataUnpickler
from mmrl_core.checkpoint.initial_weights import load_initial
from mmrl_core.contracts import Policy
from mmrl_core.errors import ModelError
from mmrl_core.testing.stage import Rank, run_ranks
from mmrl_core.testing.texts import check_minibatch, text_rollouts
from mmrl_core.testing.tiny import tiny_language_model, tiny_recipe

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def language_model(folder: Path, *, tied: bool, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    path = tiny_language_model(folder / f"model-{seed}-{tied}", tie_word_embeddings=tied, seed=seed)
    return AutoModelForCausalLM.from_pretrained(path)


def same(name: str) -> str:
    return name


def nested(words: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` below the keys that `words` names, dots between them."""
    tree: dict[str, Any] = dict(state)
    for word in reversed([w for w in words.split(".") if w]):
        tree = {word: tree}
    return tree


def equal(left: nn.Module, right: nn.Module) -> bool:
    other = dict(right.named_parameters())
    return all(torch.equal(p, other[n]) for n, p in left.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", ["", "model", "module", "state_dict", "state.model", "app.generator"])
def test_weights_are_found_behind_any_one_prefix(tmp_path: Path, tied: bool, prefix: str) -> None:
    theirs, ours = (language_model(tmp_path, tied=tied, seed=seed) for seed in (1, 2))
    optimizer = {"optimizer": {"state": {n: {"exp_avg": p.detach()} for n, p in theirs.named_parameters()}}, "step": 3}
    dcp.save({**nested(prefix, theirs.state_dict()), **optimizer}, checkpoint_id=tmp_path / "dcp")
    assert not equal(ours, theirs)
    load_initial(ours, str(tmp_path / "dcp"), same)
    assert equal(ours, theirs)
    ids = torch.arange(5)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_may_be_stored_under_any_of_its_names(tmp_path: Path, kept: str) -> None:
    theirs, ours = (language_model(tmp_path, tied=True, seed=seed) for seed in (1, 2))
    names = {"lm_head.weight", "model.embed_tokens.weight"} - {kept}
    dcp.save({n: t for n, t in theirs.state_dict().items() if n not in names}, checkpoint_id=tmp_path / "dcp")
    load_initial(ours, str(tmp_path / "dcp"), same)
    assert equal(ours, theirs)


def test_an_untied_checkpoint_does_not_fit_a_tied_model_nor_the_reverse(tmp_path: Path) -> None:
    tied, untied = (language_model(tmp_path, tied=tied, seed=1) for tied in (True, False))
    dcp.save(untied.state_dict(), checkpoint_id=tmp_path / "untied")
    with pytest.raises(ModelError, match=r"differ, but they are one tied weight"):
        load_initial(tied, str(tmp_path / "untied"), same)
    half = {n: t for n, t in tied.state_dict().items() if n != "lm_head.weight"}
    dcp.save(half, checkpoint_id=tmp_path / "tied")
    with pytest.raises(ModelError, match=r"missing \(1\): lm_head.weight"):
        load_initial(untied, str(tmp_path / "tied"), same)


class Small(nn.Module):
    """Two layers and a buffer."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)


def saved(folder: Path, state: Mapping[str, Any]) -> str:
    dcp.save(dict(state), checkpoint_id=folder / "dcp")
    return str(folder / "dcp")


def test_dtype_of_the_module_stays_and_buffers_are_optional(tmp_path: Path) -> None:
    theirs = Small().bfloat16()
    theirs.norm.running_mean.fill_(7)
    state = {n: t for n, t in theirs.state_dict().items() if "running_var" not in n}
    ours = Small()
    load_initial(ours, saved(tmp_path, state), same)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.first.weight, theirs.first.weight.float())
    assert ours.norm.running_mean.tolist() == [7.0] * 4
    assert ours.norm.running_var.tolist() == [1.0] * 4


def test_names_are_those_that_name_of_gives(tmp_path: Path) -> None:
    theirs, ours = Small(), Small()
    folder = saved(tmp_path, {f"net.{n}": t for n, t in theirs.state_dict().items()})
    load_initial(nn.ModuleDict({"wrapped": ours}), folder, lambda name: name.removeprefix("wrapped."))
    assert equal(ours, theirs)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("last.", "final."): t for n, t in state.items()}


def reshaped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "first.weight": torch.zeros(4, 5)}


def with_more(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, **{f"extra.{i}": torch.zeros(2) for i in range(7)}}


@pytest.mark.parametrize("prefix", ["", "model"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, ["missing (2): last.weight; last.bias", "unexpected (2): ", "final.weight"]),
        (reshaped, ["of another shape (1): ", "first.weight: (4, 5) in the checkpoint, (4, 3) in the model"]),
        (with_more, ["unexpected (7): ", "extra.4; ..."]),
        (lambda state: {"a.b": torch.zeros(1)}, ["missing (6): first.weight; first.bias; norm.weight; ", "; ..."]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    tmp_path: Path, prefix: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: list[str]
) -> None:
    ours = Small()
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    folder = saved(tmp_path, nested(prefix, change(Small().state_dict())))
    with pytest.raises(ModelError) as caught:
        load_initial(ours, folder, same)
    assert folder in str(caught.value)
    for words in said:
        assert words in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())


def test_weights_that_are_there_twice_are_no_choice_of_ours(tmp_path: Path) -> None:
    state = Small().state_dict()
    folder = saved(tmp_path, {**nested("student", state), **nested("teacher", state)})
    with pytest.raises(ModelError, match=r"more than once, behind 'student.', 'teacher.'"):
        load_initial(Small(), folder, same)
    ours, theirs = Small(), Small()
    both = {**nested("model", theirs.state_dict()), **nested("average", state)}
    dcp.save(both, checkpoint_id=tmp_path / "both")
    load_initial(ours, str(tmp_path / "both"), same)
    assert equal(ours, theirs)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_initial(Small(), str(tmp_path / "nowhere"), same)
    with pytest.raises(ModelError, match=r"it has no file \.metadata"):
        load_initial(Small(), str(tmp_path), same)
    (tmp_path / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(ModelError, match="cannot be read"):
        load_initial(Small(), str(tmp_path), same)
    (tmp_path / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ModelError, match="type list"):
        load_initial(Small(), str(tmp_path), same)


@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_damaged_data(tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path, Small().state_dict())
    (data,) = Path(folder).glob("*.distcp")
    data.write_bytes(data.read_bytes()[:600]) if damage == "cut" else data.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_initial(Small(), folder, same)


def test_enumerations_as_early_pythons_3_11_write_them() -> None:
    """`getattr(_MEM_FORMAT_ENCODING, NAME)`, where later ones write the class and the value."""
    kind = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    stream = b"cbuiltins\ngetattr\n(" + kind + b"VTORCH_CHANNELS_LAST\ntR."
    assert _MetadataUnpickler(io.BytesIO(stream)).load() is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST


class Boom:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code of the checkpoint ran')",))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    folder = Path(saved(tmp_path, Small().state_dict()))
    (folder / ".metadata").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(ModelError, match=r"builtins\.exec, which describes no tensor"):
        load_initial(Small(), str(folder), same)
    # of what has attributes only enumerations are asked for theirs
    for taken in (b"ctorch\nfloat32\n", b"ctorch\nSize\n"):
        (folder / ".metadata").write_bytes(b"cbuiltins\ngetattr\n(" + taken + b"Vto\ntR.")
        with pytest.raises(ModelError, match="it was not loaded"):
            load_initial(Small(), str(folder), same)
    # a dotted name would reach what the allowed modules import
    (folder / ".metadata").write_bytes(b"\x80\x04ctorch.distributed.checkpoint.metadata\nos.system\n.")
    with pytest.raises(ModelError, match="it was not loaded"):
        load_initial(Small(), str(folder), same)


SHARDED = """
import sys, os, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.device_mesh import init_device_mesh
from mmrl_core.checkpoint.initial_weights import load_initial

folder, rank = sys.argv[1], int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.load(f"{folder}/whole.pt", weights_only=True)
state = {n: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim else t for n, t in whole.items()}
dcp.save({"model": state}, checkpoint_id=f"{folder}/dcp")
dist.barrier()
if rank == 1:  # by itself: a collective in here would wait for rank 0
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7))
    load_initial(module, f"{folder}/dcp", lambda name: name)
    assert all(torch.equal(t, whole[n]) for n, t in module.state_dict().items())
dist.barrier()
dist.destroy_process_group()
"""


def test_shards_of_two_ranks_become_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sharded_save.py").write_text(SHARDED)
    monkeypatch.syspath_prepend(str(tmp_path))
    theirs = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))  # odd sizes: the shards are uneven
    torch.save(theirs.state_dict(), tmp_path / "whole.pt")
    run_ranks("sharded_save", [str(tmp_path)], 2, tmp_path, timeout_s=60)
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    ours = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    load_initial(ours, str(tmp_path / "dcp"), same)
    assert equal(ours, theirs)


# ------------------------------------------------------------------------------------------- in the text policy


@pytest.mark.parametrize("below", ["", "backend"])
def test_our_own_checkpoints_and_lora_on_top(tmp_path: Path, below: str) -> None:
    model = tiny_language_model(tmp_path / "model")
    with Rank.join("cpu", tmp_path) as rank:
        cast = rank.cast(tiny_recipe(model, tmp_path / "run"))
        backend = cast.backend()
        rollouts = text_rollouts(cast.policy)
        backend.update(check_minibatch(rollouts), _Loss())
        trained = backend.replay(rollouts).log_probs
        backend.save(tmp_path / "step" / below, optimizer=True)
        for lora in (None, {"rank": 2}):
            spec = {"init_from": str(tmp_path / "step"), "lora": lora}
            again = rank.cast(tiny_recipe(model, tmp_path / "run", model=spec))
            assert torch.equal(again.backend().replay(rollouts).log_probs, trained)
        plain = cast.backend().replay(rollouts).log_probs
        assert not torch.equal(plain, trained)
        reference = again.backend(reference=True).reference(rollouts)["log_probs"]
        assert torch.equal(torch.stack(reference), trained), "the reference is what training starts from"


def test_the_policy_says_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    model = tiny_language_model(tmp_path / "model")
    with Rank.join("cpu", tmp_path) as rank:
        policy: Policy = rank.cast(tiny_recipe(model, tmp_path, model={"init_from": str(tmp_path)})).policy
        with pytest.raises(ModelError, match=r"model\.init_from '.*' is no folder of torch\.dist"):
            policy.load(torch.float32)


class _Loss:
    scope = "action"
    entropy_gradient = False

    def __call__(self, stats: Any, batch: Any) -> Any:
        from mmrl_core.contracts import LossOutput

        return LossOutput(loss=-(batch.weight * stats.log_probs).sum())
