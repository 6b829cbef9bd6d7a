import pickle

import numpy as np
import pytest
import torch

from gradstore.errors import ProjectError
from gradstore.model.image_and_text import image, text


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_image_inverts_the_normalisation_of_every_pixel(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (5, 4) if channels is None else (channels, 5, 4)
    pixels = torch.randint(0, 256, shape, generator=generator)
    shown = image(mean=0.3, std=0.25)(((pixels / 255 - 0.3) / 0.25).to(dtype))
    expected = pixels.numpy() if channels is None else pixels.permute(1, 2, 0).squeeze(2).numpy()
    assert shown.dtype == np.uint8
    assert shown.shape == ((5, 4, 3) if channels == 3 else (5, 4))
    assert np.abs(shown.astype(int) - expected).max() <= (1 if dtype == torch.float16 else 0)


def test_image_uses_one_mean_and_std_per_channel():
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.05]
    x = torch.zeros(3, 1, 2)
    assert image(mean, std)(x)[0].tolist() == [[round(m * 255) for m in mean]] * 2


def test_image_clips_and_shows_non_numbers_as_black():
    x = torch.tensor([[-100.0, 100.0, float("nan"), float("inf"), -float("inf")]])
    assert image()(x).tolist() == [[0, 255, 0, 255, 0]]


def test_image_returns_bytes_as_they_are_and_does_not_alias_the_dataset():
    x = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    shown = image(mean=9, std=9)(x)
    assert (shown == x.transpose(1, 2, 0)).all()
    assert not np.shares_memory(shown, x)


def test_image_does_not_alias_a_gray_picture():
    x = torch.arange(4, dtype=torch.uint8).reshape(2, 2)
    assert not np.shares_memory(image()(x), x.numpy())


def test_dict_inputs_are_shown_by_key():
    x = {"pixels": torch.full((1, 2, 2), 1.0), "other": torch.zeros(3)}
    assert image(key="pixels")(x).tolist() == [[255, 255], [255, 255]]
    assert text(lambda t: f"{len(t)} tokens", key="other")(x) == "3 tokens"
    assert text(lambda d: ",".join(d))(x) == "pixels,other"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image()(torch.zeros(2, 4, 4)), "got [2, 4, 4]"),
        (lambda: image()(torch.zeros(7)), "expected [H, W] or [C, H, W] with C 1 or 3, got [7]"),
        (lambda: image()(torch.zeros(1, 0, 4)), "got [1, 0, 4]"),
        (lambda: image(mean=[0.1, 0.2])(torch.zeros(3, 2, 2)), "expected 1 or 3 numbers, got 2"),
        (lambda: image()({"a": torch.zeros(2, 2)}), "expected key= one of 'a', got no key"),
        (lambda: image(key="b")({"a": torch.zeros(2, 2)}), "expected key= one of 'a', got 'b'"),
        (lambda: image(std=float("nan")), "gs.image: std is unusable"),
        (lambda: image(mean=[]), "gs.image: mean is unusable"),
        (lambda: image(mean="red"), "gs.image: mean is unusable"),
        (lambda: text("not a function"), "expected a function, got str"),
        (lambda: text(lambda x: 3)(torch.zeros(2)), "expected str, got int"),
    ],
)
def test_unusable_input_gets_one_line(call, message):
    with pytest.raises(ProjectError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_both_say_their_kind_and_travel_to_workers():
    shown = pickle.loads(pickle.dumps(image(0.2, [0.1, 0.2, 0.3], key="x")))
    assert shown == image(0.2, [0.1, 0.2, 0.3], key="x")
    assert (shown.kind, text(str).kind) == ("image", "text")
    assert pickle.loads(pickle.dumps(text(str)))(3) == "3"
