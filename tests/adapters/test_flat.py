"""The flat buffers: modules hold views, gradients arrive in place, groups stack the right blocks."""

from __future__ import annotations

import pytest
import torch

from fastpeft.adapters.adapter import head_parameters
from fastpeft.trainer.step import forward_backward
from tests.support.classifiers import classification_loss


def lies_in(tensor: torch.Tensor, buffer: torch.Tensor) -> int:
    """Position of `tensor` in `buffer`, whose memory it shares."""
    assert tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert tensor.is_contiguous()
    return tensor.storage_offset() - buffer.storage_offset()


def one_batch(job):
    rows = job.batches.rows(0)
    from fastpeft.tasks.sequences.examples import collate

    return [collate(job.batches.encoded, rows, job.device)], len(rows)


@pytest.mark.parametrize("family", ["deberta-v2", "distilbert"])
def test_every_trainable_parameter_is_a_view(make_job, family):
    adapter = make_job(family).adapter
    flat = adapter.flat
    trainable = [p for p in adapter.model.parameters() if p.requires_grad]
    covered = torch.zeros_like(flat.data, dtype=torch.int)
    for parameter in trainable:
        start = lies_in(parameter.data, flat.data)
        assert lies_in(parameter.grad, flat.grad) == start
        covered[start : start + parameter.numel()] += 1
    assert (covered == 1).all()
    head = head_parameters(adapter.model)
    assert flat.num_adapter == flat.data.numel() - sum(p.numel() for p in head)
    assert all(lies_in(p.data, flat.data) >= flat.num_adapter for p in head)
    assert flat.adapter.numel() == flat.adapter_grad.numel() == flat.num_adapter


def test_values_are_kept(make_job, monkeypatch):
    """Moving into the buffer changes no parameter: the head is the freshly loaded one."""
    from fastpeft.adapters import flat as module

    before = {}
    adopt = module.FlatParameters._adopt

    def remember(self, parameter, start):
        before[parameter] = parameter.detach().clone()
        return adopt(self, parameter, start)

    monkeypatch.setattr(module.FlatParameters, "_adopt", remember)
    adapter = make_job("roberta").adapter
    assert len(before) == 2 * len(adapter.blocks) + 4
    assert all(torch.equal(parameter, value) for parameter, value in before.items())


@pytest.mark.parametrize("family", ["deberta-v2", "bert", "distilbert"])
def test_groups_map_to_their_blocks(make_job, family, seed):
    adapter = make_job(family).adapter
    flat, blocks = adapter.flat, adapter.blocks
    assert len(flat.groups) == 3  # attention, into the feed-forward, out of it
    flat.data.copy_(torch.randn(flat.data.shape, generator=torch.Generator().manual_seed(seed)))
    flat.grad.copy_(torch.randn(flat.grad.shape, generator=torch.Generator().manual_seed(seed + 1)))
    seen = []
    for group in flat.groups:
        for k, index in enumerate(group.index_K.tolist()):
            block = blocks[index]
            seen.append(index)
            assert group.scale == block.scale
            pairs = [
                (group.a_KRI[k], block.lora_a),
                (group.b_KOR[k], block.lora_b),
                (group.grad_a_KRI[k], block.lora_a.grad),
                (group.grad_b_KOR[k], block.lora_b.grad),
            ]
            for view, tensor in pairs:
                assert view.data_ptr() == tensor.data_ptr()
                assert torch.equal(view, tensor)
    assert sorted(seen) == list(range(len(blocks)))


def test_gradients_accumulate_in_the_buffer(make_job):
    job = make_job("bert")
    flat = job.adapter.flat
    batches, num_rows = one_batch(job)
    forward_backward(job.adapter, classification_loss, batches, num_rows)
    once = flat.grad.clone()
    assert once[flat.num_adapter :].any()
    assert job.adapter.blocks[0].lora_b.grad.any()
    forward_backward(job.adapter, classification_loss, batches, num_rows)
    torch.testing.assert_close(flat.grad, once, rtol=1e-5, atol=1e-7)
    forward_backward(job.adapter, classification_loss, batches * 2, 2 * num_rows)
    torch.testing.assert_close(flat.grad, once, rtol=1e-4, atol=1e-6)
    assert all(p.grad.untyped_storage().data_ptr() == flat.grad.data_ptr() for p in head_parameters(job.adapter.model))


def test_writing_the_buffer_changes_the_model(make_job):
    job = make_job("bert")
    batches, _ = one_batch(job)
    model = job.adapter.model.eval()
    before = model(**batches[0].inputs).logits
    job.adapter.flat.data.mul_(2)
    assert not torch.allclose(model(**batches[0].inputs).logits, before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_models_train_in_fp32(make_job, precision):
    job = make_job("deberta-v2", training__precision=precision)
    flat = job.adapter.flat
    assert flat.data.dtype == flat.grad.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in job.adapter.model.parameters() if p.requires_grad)
    assert job.adapter.blocks[0].module.base_layer.weight.dtype == job.dtype != torch.float32
    batches, num_rows = one_batch(job)
    forward_backward(job.adapter, classification_loss, batches, num_rows)
    assert flat.grad.isfinite().all()
    assert all(block.lora_b.grad.any() for block in job.adapter.blocks)


def test_save_pretrained_and_state_dict_work_on_views(make_job, tmp_path):
    from safetensors.torch import load_file

    adapter = make_job("bert").adapter
    torch.nn.init.normal_(adapter.flat.data)
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapter.save(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == adapter.flat.data.numel()
    for block in adapter.blocks:
        name = next(n for n in saved if n.endswith(f"{block.name}.lora_A.weight"))
        assert torch.equal(saved[name], block.lora_a)
