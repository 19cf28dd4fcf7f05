"""Low-rank adapters: start as the identity, merge exactly, train nothing else."""

from dataclasses import replace

import pytest
import torch

from vlarft.nets.lora import LoRAConfig, LoRALinear, add_lora, merge_state_dict
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
        for key, value in model.state_dict().items():
            if key.endswith("lora_b"):
                value.normal_()
    return model


def test_hand_computed():
    linear = torch.nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0]])
    layer = LoRALinear(linear, cfg := LoRAConfig(rank=1, alpha=3.0))
    layer.lora_a.data, layer.lora_b.data = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0]])
    assert not layer.weight.requires_grad and layer.lora_a.requires_grad and layer.lora_b.requires_grad
    # 1*5 + 2*1 = 7; 3/1 * 2 * (5 - 1) = 24
    assert layer(torch.tensor([5.0, 1.0])).item() == 31.0
    merged = merge_state_dict(torch.nn.Sequential(layer).state_dict(), cfg)
    assert {name: value.tolist() for name, value in merged.items()} == {"0.weight": [[7.0, -4.0]]}


def test_starts_as_the_base_and_merges_exactly():
    x = torch.randn(6, 5)
    model = network()
    before = model(x)
    assert add_lora(model, CFG) == 3 * (5 + 7) + 3 * (7 + 4)
    assert torch.equal(model(x), before)

    model = trained()
    adapted = model(x)
    assert not torch.allclose(adapted, before)
    merged = network()
    merged.load_state_dict(merge_state_dict(model.state_dict(), CFG))  # no adapter is left
    torch.testing.assert_close(merged(x), adapted, atol=1e-5, rtol=1e-5)  # another order of additions
    assert torch.equal(model(x), adapted)  # goes on training as it was


def test_gradient_reaches_adapters_only():
    model = trained()
    model(torch.randn(6, 5)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


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
    with pytest.raises(ValueError, match="the module has no linear layer"):
        add_lora(torch.nn.GELU(), CFG)
