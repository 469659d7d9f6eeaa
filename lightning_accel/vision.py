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
# do_reduce_labels is about a segmentation's labels, not the image
_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_flip_channel_order",
          "do_reduce_labels"}  # fmt: skip
_REFUSED = ("keep_aspect_ratio", "offset", "size_divisor")
_SIZES = ({"height", "width"}, {"shortest_edge"})


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


def check_preparation(config: dict[str, Any]) -> None:
    """Raises ValueError where a `preprocessor_config.json` asks for a step that `prepare` does not know."""
    size = config.get("size") if config.get("do_resize", True) else None
    refused = [name for name, value in config.items() if name.startswith("do_") and value and name not in _STEPS]
    refused += [name for name in _REFUSED if config.get(name)]
    if config.get("crop_pct") and not _is_convnext(config):
        refused.append("crop_pct")
    if config.get("ensure_multiple_of") not in (None, 1):
        refused.append("ensure_multiple_of")
    if isinstance(size, dict) and {name for name, edge in size.items() if edge} not in _SIZES:
        refused.append("size")
    if refused:
        asked = ", ".join(f"{name}={config[name]!r}" for name in refused)
        raise ValueError(
            f"the image processor asks for {asked}, which is not supported here; prepare the images yourself, call "
            "model(pixel_values), and export without processor="
        )


def prepare(image: Tensor, config: dict[str, Any]) -> Tensor:
    """float32 [1, C, H, W] of a uint8 image [C, H, W], as `config` (a `preprocessor_config.json`) describes it.

    Raises:
        ValueError: the configuration asks for a step that is not known here.
    """
    check_preparation(config)
    if config.get("do_convert_rgb") and image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    image = image[None]
    if config.get("do_resize", True) and config.get("size"):
        mode = _MODES.get(config.get("resample", 2))
        if mode is None:
            raise ValueError(f"resample={config['resample']} is not supported; prepare the images yourself")
        size = _convnext_size(config, image) if _is_convnext(config) else _size(config["size"], image)
        options = {} if mode == "nearest-exact" else {"antialias": True, "align_corners": False}
        image = F.interpolate(image, size, mode=mode, **options)  # of bytes, rounded as Pillow does
        if _is_convnext(config):
            image = _center_crop(image, *[_edge(config["size"])] * 2)
    if config.get("do_center_crop") and config.get("crop_size"):
        image = _center_crop(image, *_size(config["crop_size"], image))
    image = image.float()
    if config.get("do_rescale", True):
        image = image * config.get("rescale_factor", 1 / 255) - float(bool(config.get("rescale_offset")))
    # MobileViT's network takes BGR that is not normalized; its processor then leaves do_normalize out
    if config.get("do_normalize", "do_flip_channel_order" not in config) and config.get("image_mean") is not None:
        mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        image = (image - mean) / std
    if config.get("include_top") and config.get("image_std") is not None:
        image = image / torch.tensor(config["image_std"]).view(-1, 1, 1)  # once more, as EfficientNet was trained
    return image.flip(1) if config.get("do_flip_channel_order") and image.shape[1] == 3 else image


def _size(size: Any, image: Tensor) -> tuple[int, int]:
    """(height, width) that transformers means by `size`: a number, {height, width} or {shortest_edge}."""
    if isinstance(size, dict) and size.get("height"):
        return size["height"], size["width"]
    edge = _edge(size)
    if isinstance(size, int):
        return edge, edge
    height, width = image.shape[-2:]
    shortest, longest = sorted((height, width))
    other = int(edge * longest / shortest)
    return (other, edge) if height > width else (edge, other)


def _edge(size: Any) -> int:
    return size["shortest_edge"] if isinstance(size, dict) else size


def _is_convnext(config: dict[str, Any]) -> bool:
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    return kind.startswith("ConvNext")


def _convnext_size(config: dict[str, Any], image: Tensor) -> tuple[int, int]:
    """Below 384 the size from which the middle is cut, else the square itself."""
    edge = _edge(config["size"])
    if edge >= 384:
        return edge, edge
    return _size({"shortest_edge": int(edge / (config.get("crop_pct") or 224 / 256))}, image)


def _center_crop(image: Tensor, height: int, width: int) -> Tensor:
    """The middle of an image, with zeros around it where it is smaller."""
    more = [max(0, wanted - have) for wanted, have in zip((height, width), image.shape[-2:], strict=True)]
    image = F.pad(image, (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2))
    top, left = ((have - wanted) // 2 for wanted, have in zip((height, width), image.shape[-2:], strict=True))
    return image[..., top : top + height, left : left + width]
