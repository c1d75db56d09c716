"""Tensors that are uploaded in pieces are those that are read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lmdeploy.errors import LoadError
from lmdeploy.weights.bytefile import ByteFile
from lmdeploy.weights.checkpoint import open_checkpoint
from lmdeploy.weights.upload import Uploader


@pytest.mark.parametrize('size', [0, 1, 64, 65, 1000, 4096])
def test_pieces_come_in_their_places(tmp_path, size):
    path = tmp_path / 'file'
    content = bytes(i * 7 % 251 for i in range(5000))
    path.write_bytes(content)
    uploader = Uploader(torch.device('cpu'), piece=64, buffers=3)
    file = ByteFile(path)
    for offset in (0, 13):
        assert bytes(uploader.read(file, offset, size).tolist()) == content[offset : offset + size]
    with pytest.raises(LoadError) as caught:
        uploader.read(file, 4000, 2000)
    assert caught.value.code == 'LMD-123'
    uploader.close()
    file.close()


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_a_checkpoint_uploads_what_it_would_read(tmp_path, device):
    tensors = {'a.weight': torch.randn(7, 5).bfloat16(), 'b.weight': torch.randn(3), 'c.weight': torch.zeros(0, 4)}
    save_file(tensors, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text('{}')
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.upload_to(torch.device(device))
        for name, tensor in tensors.items():
            found = checkpoint.get(name)
            assert found.device.type == device and found.dtype == tensor.dtype and torch.equal(found.cpu(), tensor)
        assert checkpoint.get('a.weight', (7, 5), torch.float32).dtype == torch.float32
        assert not checkpoint.leftover()
