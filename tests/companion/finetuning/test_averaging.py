import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qtune_companion.finetuning.averaging import WeightAverage


def model_at(value):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    model[1].requires_grad_(False)
    return model


def test_is_the_mean_of_the_trainable_weights_alone():
    torch.manual_seed(0)
    states = [torch.randn(2, 3) for _ in range(7)]
    model, average = model_at(0.0), WeightAverage()
    for state in states:
        model[0].weight.data.copy_(state)
        average.update(model)
    assert average.count == 7
    assert set(average.mean) == {"0.weight", "0.bias"}
    average.copy_to_(model)
    torch.testing.assert_close(model[0].weight.data, torch.stack(states).mean(0))
    assert (model[1].weight == 0).all()


def test_half_precision_weights_are_averaged_in_single():
    average = WeightAverage()
    for value in (1.0, 1.0078125, 1.0):  # their mean is no bfloat16
        average.update(model_at(value).to(torch.bfloat16))
    assert average.mean["0.weight"].dtype == torch.float32
    assert average.mean["0.weight"][0, 0].item() == pytest.approx(1 + 0.0078125 / 3, abs=1e-6)


def test_saved_and_loaded_goes_on_to_the_same_bits(tmp_path):
    whole, first, second = WeightAverage(), WeightAverage(), WeightAverage()
    for value in (0.1, 0.2, 0.7, 0.9):
        whole.update(model_at(value))
    for value in (0.1, 0.2):
        first.update(model_at(value))
    first.save(tmp_path / "average.safetensors")
    second.load(tmp_path / "average.safetensors")
    for value in (0.7, 0.9):
        second.update(model_at(value))
    assert second.count == whole.count
    assert all(torch.equal(second.mean[k], whole.mean[k]) for k in whole.mean)
    assert [p.name for p in tmp_path.iterdir()] == ["average.safetensors"]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing was averaged"):
        WeightAverage().copy_to_(model_at(0.0))
    average = WeightAverage()
    average.update(model_at(0.0))
    with pytest.raises(ValueError, match="no parameter '0.bias'"):
        average.copy_to_(nn.Linear(3, 2))
    with pytest.raises(FileNotFoundError, match="no saved average"):
        average.load(tmp_path / "none")
    (tmp_path / "broken").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is broken"):
        average.load(tmp_path / "broken")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="holds no count"):
        average.load(tmp_path / "foreign")
