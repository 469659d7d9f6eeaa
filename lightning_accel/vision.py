"""Images in: the preprocessing that a transformers image processor describes, with torch alone.

Pillow is needed to open files only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .loaded import LoadedModel

PREPROCESSOR = "preprocessor_config.json"
_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def pixel_values(model: LoadedModel, images: Sequence[Any]) -> Tensor:
    """Images as an artifact's network takes them: resized, cropped, scaled and normalized, float32 [N, C, H, W].

    Args:
        images: uint8 tensors or arrays [C, H, W], images of Pillow, or paths of image files.

    Raises:
        ValueError: the artifact does not say how images are prepared, or an image is of another kind.
    """
    config = json.loads(model.asset(PREPROCESSOR).read_text())
    return torch.cat([prepare(read_image(image), config) for image in images])


def read_image(image: Any) -> Tensor:
    """uint8 [C, H, W] of a tensor, an array, an image of Pillow or a path."""
    if isinstance(image, str | Path):
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("image files need the package Pillow: pip install pillow") from error
        image = Image.open(image)
    if hasattr(image, "convert"):  # of Pillow
        image = image.convert("RGB")
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return data.view(image.height, image.width, 3).permute(2, 0, 1)
    tensor = torch.as_tensor(image)
    if tensor.dtype != torch.uint8 or tensor.dim() != 3 or tensor.shape[0] not in (1, 3) or 0 in tensor.shape:
        raise ValueError(
            f"an image is {tensor.dtype} {list(tensor.shape)}, expected torch.uint8 [channels, height, width]; give "
            "prepared float images to the model itself: model(pixel_values)"
        )
    return tensor


def prepare(image: Tensor, config: dict[str, Any]) -> Tensor:
    """float32 [1, C, H, W] of a uint8 image [C, H, W], as `config` (a `preprocessor_config.json`) describes it."""
    if config.get("do_convert_rgb") and image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    image = image[None]
    if config.get("do_resize", True) and config.get("size"):
        mode = _MODES.get(config.get("resample", 2))
        if mode is None:
            raise ValueError(f"resample={config['resample']} is not supported; prepare the images yourself")
        size = _size(config["size"], image)
        options = {} if mode == "nearest-exact" else {"antialias": True, "align_corners": False}
        image = F.interpolate(image, size, mode=mode, **options)  # of bytes, rounded as Pillow does
    if config.get("do_center_crop") and config.get("crop_size"):
        image = _center_crop(image, *_size(config["crop_size"], image))
    image = image.float()
    if config.get("do_rescale", True):
        image = image * config.get("rescale_factor", 1 / 255)
    if config.get("do_normalize", True) and config.get("image_mean") is not None:
        mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        image = (image - mean) / std
    return image


def _size(size: Any, image: Tensor) -> tuple[int, int]:
    """(height, width) that transformers means by `size`: a number, {height, width} or {shortest_edge}."""
    if isinstance(size, dict) and "height" in size:
        return size["height"], size["width"]
    edge = size["shortest_edge"] if isinstance(size, dict) else size
    if isinstance(size, int):
        return edge, edge
    height, width = image.shape[-2:]
    shortest, longest = sorted((height, width))
    other = int(edge * longest / shortest)
    return (other, edge) if height > width else (edge, other)


def _center_crop(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of an image, with zeros around it where it is smaller."""
    more = [max(0, wanted - have) for wanted, have in zip((height, width), image.shape[-2:], strict=True)]
    image = F.pad(image, (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2))
    top, left = ((have - wanted) // 2 for wanted, have in zip((height, width), image.shape[-2:], strict=True))
    return image[..., top : top + height, left : left + width]
