import pytest
import torch

from vlarft.run.precision import in_bf16

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    in_bf16.cache_clear()
    yield
    in_bf16.cache_clear()


@pytest.mark.parametrize(("precision", "half"), [("bf16", True), ("fp32", False)])
def test_a_named_format_is_taken_as_it_is(precision, half, capsys):
    assert in_bf16(precision, CPU) is half
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("amx", "avx512", "chosen"),
    [
        (True, True, "bfloat16, on a processor with AMX and AVX512-BF16\n"),
        (False, True, "bfloat16, on a processor with AVX512-BF16\n"),
        (False, False, "float32, on a processor without AMX and AVX512-BF16\n"),
    ],
)
def test_auto_asks_the_processor_and_says_so_once(amx, avx512, chosen, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert in_bf16("auto", CPU) is avx512
    assert in_bf16("auto", CPU) is avx512
    out = capsys.readouterr().out
    assert out.count("precision auto") == 1
    assert chosen in out


@pytest.mark.parametrize("ampere", [True, False])
def test_auto_asks_the_gpu(ampere, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ampere)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert in_bf16("auto", torch.device("cuda", 0)) is ampere
    assert "on a card" in capsys.readouterr().out
