"""Low-rank adapters: start as the identity, merge exactly, train nothing else."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from vlarft.nets.lora import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    has_lora,
    load_lora,
    lora_state_dict,
    merge_lora,
    merge_state_dict,
    save_lora,
)
from vlarft.nets.vit import SIGLIP_SO400M
from vlarft.nets.vlm import VLM, VLMConfig

CFG = LoRAConfig(rank=3, alpha=6.0)


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 4, bias=False))


def trained() -> torch.nn.Sequential:
    model = network()
    add_lora(model, CFG)
    with torch.no_grad():
        for key, value in lora_state_dict(model).items():
            if key.endswith("lora_b"):
                value.normal_()
    return model


def test_hand_computed():
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0]])
    layer = LoRALinear(linear, LoRAConfig(rank=1, alpha=3.0))
    layer.lora_a.data, layer.lora_b.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0]])
    assert not layer.weight.requires_grad and layer.lora_a.requires_grad and layer.lora_b.requires_grad
    # 1*5 + 2*1 = 7; 3/1 * 2 * (5 - 1) = 24
    assert layer(torch.tensor([5.0, 1.0])).item() == 31.0
    assert layer.merged().weight.tolist() == [[7.0, -4.0]]


def test_starts_as_the_base_and_merges_exactly():
    x = torch.randn(6, 5)
    model = network()
    before = model(x)
    assert add_lora(model, CFG) == 3 * (5 + 7) + 3 * (7 + 4)
    assert torch.equal(model(x), before)

    model = trained()
    adapted = model(x)
    assert not torch.allclose(adapted, before)
    from_state = network()
    from_state.load_state_dict(merge_state_dict(model.state_dict(), CFG))
    assert merge_lora(model) == 2
    assert not has_lora(model) and list(model.state_dict()) == list(network().state_dict())
    torch.testing.assert_close(model(x), adapted, atol=1e-5, rtol=1e-5)  # another order of additions
    assert all(torch.equal(model.state_dict()[k], v) for k, v in from_state.state_dict().items())


def test_gradient_reaches_adapters_only():
    model = trained()
    model(torch.randn(6, 5)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_adapters_round_trip_alone(tmp_path):
    model, path, x = trained(), tmp_path / "adapters.safetensors", torch.randn(6, 5)
    save_lora(path, model)
    assert path.stat().st_size < 2000 and set(load_file(path)) == {f"{i}.lora_{m}" for i in (0, 2) for m in "ab"}
    for other in (network(), trained()):  # onto the bare model, and in place of other values
        with torch.no_grad():
            for value in lora_state_dict(other).values():
                value.zero_()
        load_lora(path, other)
        assert torch.equal(other(x), model(x))
        assert all(p.requires_grad == ("lora_" in k) for k, p in other.named_parameters())
        merge_lora(other)
        torch.testing.assert_close(other(x), model(x), atol=1e-6, rtol=1e-6)


def test_adapters_that_do_not_fit(tmp_path):
    path, other = tmp_path / "adapters.safetensors", network()
    with pytest.raises(ValueError, match="the module has no adapters; add_lora first"):
        save_lora(path, network())
    save_lora(path, trained())
    add_lora(other, replace(CFG, rank=4, alpha=8.0))
    with pytest.raises(ValueError, match="other adapters than the module's: rank: 3 against 4; alpha: 6.0 against 8.0"):
        load_lora(path, other)
    wide = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.GELU())
    with pytest.raises(
        ValueError, match=r"linear layers: 0.lora_b: \(7, 3\) against \(8, 3\); 2.lora_a: .* against None"
    ):
        load_lora(path, wide)
    assert not has_lora(wide)
    with pytest.raises(ValueError, match="holds adapters of a Sequential, the module is a Linear"):
        load_lora(path, torch.nn.Linear(5, 7))


def test_targets_and_dropout():
    model = network()
    add_lora(model, LoRAConfig(rank=2, targets=("2",), dropout=0.5))
    assert isinstance(model[2], LoRALinear) and not isinstance(model[0], LoRALinear)
    model[2].lora_b.data.normal_()
    x = torch.randn(6, 5)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_paper_adapter_count():
    with torch.device("meta"):
        model = VLM(VLMConfig())
        assert add_lora(model, LoRAConfig()) == 93_798_400
        for encoder in (model.vision, model.fused_vision):
            encoder.freeze_unread()
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 90_394_624
        without_pool = VLM(VLMConfig(fused_vision=replace(SIGLIP_SO400M, attention_pool=False)))
        assert add_lora(without_pool, LoRAConfig()) == 92_583_936


def test_errors():
    with pytest.raises(ValueError, match="rank: got 0, expected at least 1"):
        add_lora(network(), LoRAConfig(rank=0))
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(trained(), CFG)
    with pytest.raises(ValueError, match="no linear layer has such a name"):
        add_lora(network(), LoRAConfig(targets=("q_proj",)))
