import io
import pickle
import struct

import numpy as np
import pytest
import torch

from stability_probe import StabilityProbeError
from stability_probe.checkpoints import load_checkpoint
from stability_probe.checkpoints.formats import kind_of
from stability_probe.checkpoints.pickles import read_pickle
from tests.checkpoints.mutations import assert_one_line, explains
from tests.checkpoints.saved_files import (
    Cage,
    Canary,
    conv_unet,
    diffusers_unet,
    pack_again,
    save_legacy,
    save_plain,
    save_program,
    save_tar,
)

SAVERS = {"zip": torch.save, "legacy": save_legacy, "plain": save_plain, "tar": save_tar}
savers = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
TRUST = r"if you trust its author, pass --trust-pickle \(trust_pickle=True\)"


def read(path, trust=False):
    return read_pickle(path, kind_of(path), trust)


# ── code is not run ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def payloads(canary):
    state = conv_unet().state_dict()
    return {
        "beside the weights": {"model": state, "extra": Canary(canary)},
        "among the weights": state | {"extra": Canary(canary)},
        "alone": Canary(canary),
        "in a module": Cage(Canary(canary)),
        "deep": {"a": {"b": [({"c": Canary(canary)},)]}},
    }


def into_file(save, payload, folder):
    save(payload, folder / "net.pt")
    return folder / "net.pt"


def into_folder(save, payload, folder):
    (folder / "run").mkdir()
    save(payload, folder / "run" / "pytorch_model.bin")
    return folder / "run"


def into_averages(save, payload, folder):
    """An accelerate folder whose model is sound."""
    (folder / "run").mkdir()
    save({"shadow_params": payload}, folder / "run" / "ema.pth")
    save(payload, folder / "run" / "model.bin")
    return folder / "run"


def into_diffusers(save, payload, folder):
    diffusers_unet().save_pretrained(folder / "net", safe_serialization=False)
    save(payload, folder / "net" / "diffusion_pytorch_model.bin")
    return folder / "net"


def into_pipeline(save, payload, folder):
    (folder / "pipe").mkdir()
    (folder / "pipe" / "model_index.json").write_text("{}")
    diffusers_unet().save_pretrained(folder / "pipe" / "unet", safe_serialization=False)
    save(payload, folder / "pipe" / "unet" / "diffusion_pytorch_model.bin")
    return folder / "pipe"


def into_shards(save, payload, folder):
    diffusers_unet().save_pretrained(folder / "net", safe_serialization=False, max_shard_size="8KB")
    save(payload, max((folder / "net").glob("*.bin")))
    return folder / "net"


PLACES = [into_file, into_folder, into_averages, into_diffusers, into_pipeline, into_shards]


@savers
@pytest.mark.parametrize("place", PLACES)
def test_code_runs_only_if_trusted_wherever_the_file_lies(tmp_path, canary, save, place):
    path = place(save, payloads(canary)["among the weights"], tmp_path)
    with pytest.raises(StabilityProbeError, match=TRUST) as error:
        load_checkpoint(path)
    assert_one_line(str(error.value))
    assert not canary.exists()
    with pytest.warns(UserWarning, match="trusted, and reading it runs code from the file"):
        explains(lambda: load_checkpoint(path, trust_pickle=True))
    assert canary.exists()


@savers
@pytest.mark.parametrize("payload", payloads(None))
def test_code_runs_only_if_trusted_wherever_in_the_file_it_lies(tmp_path, canary, save, payload):
    save(payloads(canary)[payload], tmp_path / "net.pt")
    with pytest.raises(StabilityProbeError, match=TRUST):
        load_checkpoint(tmp_path / "net.pt")
    assert not canary.exists()
    with pytest.warns(UserWarning, match="trusted"):
        explains(lambda: load_checkpoint(tmp_path / "net.pt", trust_pickle=True))
    assert canary.exists()


@pytest.mark.parametrize("weights", ["model", "ema", "pytorch_model"])
def test_every_choice_of_weights_is_as_careful(tmp_path, canary, weights):
    path = into_averages(torch.save, {"w": Canary(canary)}, tmp_path)
    with pytest.raises(StabilityProbeError, match=TRUST + "|is not in it"):
        load_checkpoint(path, weights=weights)
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_runs_code(tmp_path, canary, protocol):
    (tmp_path / "net.pt").write_bytes(pickle.dumps(Canary(canary), protocol))
    torch.save(Canary(canary), tmp_path / "zip.pt", pickle_protocol=max(protocol, 2))
    for name in ("net.pt", "zip.pt"):
        with pytest.raises(StabilityProbeError):
            load_checkpoint(tmp_path / name)
    assert not canary.exists()


# ── what is said ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_plain])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Canary("x"), r"'(builtins\.|__builtin__\.)?exec'"),
        (Cage(None), r"'tests.checkpoints.saved_files.Cage'"),
        ({"loss": np.float64(3)}, r"'numpy\.(_core|core)\.multiarray\.scalar'"),
    ],
    ids=["code", "module", "number"],
)
def test_what_was_found_is_named(tmp_path, save, value, name):
    save(value, tmp_path / "net.pt")
    with pytest.raises(
        StabilityProbeError, match=f"net.pt: its pickle needs more than tensors: {name}.*; {TRUST}"
    ) as error:
        read(tmp_path / "net.pt")
    assert_one_line(str(error.value))
    assert "Please use" not in str(error.value)


def test_rejects_a_tar(tmp_path):
    save_tar({"w": 1}, tmp_path / "net.pt")
    with pytest.raises(
        StabilityProbeError, match=f"the tar format of torch .* runs code.*; {TRUST}"
    ):
        read(tmp_path / "net.pt")


@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_tensors_and_containers_need_no_trust_and_no_warning(tmp_path, save, recwarn):
    saved = {"state": conv_unet().state_dict(), "step": 3, "list": [1, (2.5, None)], "name": "κ"}
    save(saved, tmp_path / "net.pt")
    found = read(tmp_path / "net.pt")
    assert found.keys() == saved.keys()
    assert found["list"] == saved["list"]
    assert all(torch.equal(found["state"][k], v) for k, v in saved["state"].items())
    assert not recwarn.list


# ── trusted files ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore:.*trusted")
@pytest.mark.parametrize("save", [torch.save, save_legacy, save_plain])
def test_trusted_files_hold_anything(tmp_path, save):
    save({"net": conv_unet(), "number": np.float64(3)}, tmp_path / "net.pt")
    found = read(tmp_path / "net.pt", trust=True)
    assert found["number"] == 3
    assert torch.equal(found["net"].inp.weight, conv_unet().inp.weight)


@pytest.mark.filterwarnings("ignore:.*trusted")
@pytest.mark.parametrize("save", [torch.save, save_legacy, save_plain])
def test_a_trusted_file_that_raises_is_an_error_of_one_line(tmp_path, save):
    class Raises:
        def __reduce__(self):
            return exec, ("raise RuntimeError('a\\nb')",)

    save(Raises(), tmp_path / "net.pt")
    with pytest.raises(StabilityProbeError, match=r"as a file of torch.save .RuntimeError: a b"):
        read(tmp_path / "net.pt", trust=True)


# ── tensors of another device, and of the wrong size ─────────────────────────────────────────────


@pytest.mark.parametrize("save", [torch.save, save_legacy])
@pytest.mark.parametrize("device", ["cuda:0", "cuda:7", "mps", "xpu:1"])
def test_tensors_saved_on_another_device_come_to_the_cpu(tmp_path, monkeypatch, save, device):
    state = conv_unet().state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: device)
        save(state, tmp_path / "net.pt")
    assert device.encode() in (tmp_path / "net.pt").read_bytes()
    found = read(tmp_path / "net.pt")
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert all(torch.equal(found[name], state[name]) for name in state)


def program_of(path):
    return torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")


def claiming(path, shape=b"K\4", storage=b"K\4"):
    """A file of one tensor of 4 numbers that claims other sizes."""
    torch.save({"w": torch.arange(4.0)}, path)
    program = program_of(path)
    assert program.count(b"K\4t") == program.count(b"K\4\x85") == 1
    program = program.replace(b"K\4t", storage + b"t").replace(b"K\4\x85", shape + b"\x85")
    return pack_again(path, {"data.pkl": program})


def number(n):
    return b"J" + struct.pack("<i", n)


def test_claims_that_are_true_are_read(tmp_path):
    path = claiming(tmp_path / "net.pt", number(4), number(4))
    assert read(path)["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("claim", [5, 2**20, 2**30])
def test_rejects_a_shape_beyond_its_storage(tmp_path, claim):
    path = claiming(tmp_path / "net.pt", shape=number(claim))
    with pytest.raises(StabilityProbeError, match=r"cannot be read as a file of torch.save"):
        read(path)


@pytest.mark.parametrize("claim", [2**12, 2**20, 2**30])
def test_rejects_a_storage_beyond_its_file(tmp_path, claim):
    path = claiming(tmp_path / "net.pt", number(claim), number(claim))
    with pytest.raises(StabilityProbeError, match=r"cannot be read as a file of torch.save"):
        read(path)


def test_a_storage_never_reaches_beyond_its_file(tmp_path):
    path = claiming(tmp_path / "net.pt", storage=number(2**30))
    assert read(path)["w"].untyped_storage().nbytes() < path.stat().st_size


@pytest.mark.parametrize("claim", [5, 2**20, 2**30])
def test_rejects_a_legacy_tensor_of_more_numbers_than_the_file_has(tmp_path, claim):
    path = tmp_path / "net.pt"
    save_legacy({"w": torch.arange(4.0)}, path)
    data, new = path.read_bytes(), number(claim) + b"\x85"
    assert data.count(b"K\4\x85") == 1
    path.write_bytes(data.replace(b"K\4\x85", new))
    assert explains(lambda: read(path))


# ── files that would take forever ────────────────────────────────────────────────────────────────

DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
BOMBS = {
    "doubled": b"\x80\x02}" + DOUBLED + b"K\x01s.",
    "deep": b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s.",
    "bytearray": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\2\x85R.",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_do_not_go_off(tmp_path, bomb):
    with pytest.raises(StabilityProbeError, match=r"its pickle makes a (tuple|bytearray)"):
        read(save_program(bomb, tmp_path / "zip.pt"))
    (tmp_path / "plain.pt").write_bytes(bomb)
    with pytest.raises(StabilityProbeError, match=r"its pickle makes a (tuple|bytearray)"):
        read(tmp_path / "plain.pt")


def test_a_bomb_behind_other_pickles_does_not_go_off(tmp_path):
    save_legacy({}, tmp_path / "net.pt")
    stream = io.BytesIO((tmp_path / "net.pt").read_bytes())
    heads = [pickle.load(stream) for _ in range(3)]
    data = b"".join(pickle.dumps(head, 2) for head in heads) + BOMBS["doubled"]
    (tmp_path / "net.pt").write_bytes(data)
    with pytest.raises(StabilityProbeError, match="its pickle makes a tuple"):
        read(tmp_path / "net.pt")


def test_a_deep_nest_of_lists_is_no_weights(tmp_path):
    program = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    path = save_program(program, tmp_path / "net.pt")
    with pytest.raises(StabilityProbeError, match=r"holds no weights but a list; save model.state"):
        load_checkpoint(path)


@pytest.mark.parametrize("program", [b"", b"\x80\x02", b"\x80\x02}q", b"garbage", b"\x80\x02\x85."])
def test_rejects_a_program_that_cannot_run(tmp_path, program):
    path = save_program(program, tmp_path / "net.pt")
    with pytest.raises(
        StabilityProbeError, match=r"cannot be read as a file of torch.save"
    ) as error:
        read(path)
    assert_one_line(str(error.value))
