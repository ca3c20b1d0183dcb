"""CycleGAN: learns to repaint synthetic pictures as real ones from unpaired examples."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from udas.config import MethodConfig, OptimiserConfig
from udas.data.batch import Batch, Stream
from udas.data.sampling import seed_of
from udas.errors import DataError
from udas.losses import cross_entropy, squared_distance
from udas.methods.base import Method, Optimised, Task
from udas.methods.frozen import Frozen
from udas.networks.discriminators import NLayerDiscriminator
from udas.networks.generators import GeneratorConfig, ResnetGenerator, Translator, save_translator

REAL, FAKE = 1.0, 0.0  # what a discriminator should say of pictures and of translations


class GANOptimiser(OptimiserConfig):
    """Adam as CycleGAN uses it: constant for the first half of the steps, then linearly to zero."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = Field(2e-4, gt=0, description="base learning rate")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = Field((0.5, 0.999), description="Adam and AdamW only")
    schedule: Literal["constant", "poly", "cosine", "linear"] = Field(
        "linear", description="poly: (1-t/T)^power; linear: constant until `decay_from`, then to zero"
    )


class CycleGANConfig(MethodConfig):
    """Settings of CycleGAN. The batch of the paper is 1; pictures are crops with sides that are multiples of 4."""

    name: Literal["cyclegan"] = "cyclegan"
    generator: GeneratorConfig = GeneratorConfig()
    critic_width: int = Field(64, gt=0, description="channels of the discriminators' first convolution")
    lambda_a: float = Field(10.0, ge=0, description="lambda_A: weight of the cycle x -> G(x) -> F(G(x))")
    lambda_b: float = Field(10.0, ge=0, description="lambda_B: weight of the cycle y -> F(y) -> G(F(y))")
    lambda_idt: float = Field(0.5, ge=0, description="lambda_idt: weight of the identity terms, times lambda_A or _B")
    semantic: float = Field(
        0.0, ge=0, description="weight of L_sem (CyCADA): classes as the stage's `teacher` sees them stay; 0 = none"
    )
    pool: int = Field(50, ge=0, description="past translations each discriminator is shown again; 0 = none")
    noise: float = Field(
        0.0,
        ge=0,
        description="standard deviation of the noise on all pictures that discriminators see",
    )
    generators: GANOptimiser = Field(GANOptimiser(), description="optimiser of G and F")
    discriminators: GANOptimiser = Field(GANOptimiser(), description="optimiser of D_X and D_Y")


class CycleGAN(Method[CycleGANConfig]):
    """Zhu et al., ICCV 2017, with least-squares GAN losses; G: X -> Y, F: Y -> X, critics D_X, D_Y.

    x: synthetic, y: real pictures, in [-1, 1]. The generators minimise, with the critics held,

        L_GAN(G) = E[(D_Y(G(x)) - 1)^2]                              L_GAN(F) = E[(D_X(F(y)) - 1)^2]
        L_cyc    = lambda_A ||F(G(x)) - x||_1 + lambda_B ||G(F(y)) - y||_1
        L_idt    = lambda_idt (lambda_B ||G(y) - y||_1 + lambda_A ||F(x) - x||_1)
        L_sem    = semantic (CE(f_S(G(x)), argmax f_S(x)) + CE(f_S(F(y)), argmax f_S(y)))

    and then the critics, on pictures from a pool of past translations,

        L_D      = 1/2 (E[(D_Y(y) - 1)^2] + E[D_Y(pool(G(x)))^2]) + the same for D_X, x, F(y)

    where ||.||_1 is the mean of absolute differences. L_sem is that of CyCADA (Hoffman et al., ICML 2018, section 3):
    f_S is a frozen segmenter that was trained on synthetic pictures as they are, the stage's `teacher`.
    Only G is handed on.
    """

    settings = CycleGANConfig
    makes = "translator"
    needs = frozenset({Stream.SOURCE, Stream.UNLABELLED})

    def __init__(self, config: CycleGANConfig, task: Task) -> None:
        super().__init__(config, task)
        self.G, self.F = ResnetGenerator(config.generator), ResnetGenerator(config.generator)
        self.D_X, self.D_Y = (NLayerDiscriminator(3, config.critic_width) for _ in range(2))
        self.pool_x, self.pool_y = ImagePool(config.pool), ImagePool(config.pool)
        self.f_S = Frozen(task) if config.semantic else None

    def optimised(self) -> dict[str, Optimised]:
        """One optimiser for both generators, one for both discriminators."""
        return {
            "generators": Optimised.module(nn.ModuleList([self.G, self.F]), self.config.generators),
            "discriminators": Optimised.module(nn.ModuleList([self.D_X, self.D_Y]), self.config.discriminators),
        }

    def step(self, batch: Batch) -> None:
        """Train both generators against the frozen discriminators, then the discriminators on pooled translations."""
        source, target = batch.source, batch.unlabelled
        assert source is not None
        assert target is not None
        x, y = 2 * source.image - 1, 2 * target.image - 1
        lambda_a, lambda_b, lambda_idt = self.config.lambda_a, self.config.lambda_b, self.config.lambda_idt
        with self.update("generators") as minimise:
            fake_y = self.G(x)
            gan, cycle = squared_distance(self.D_Y(self._noisy(fake_y)), REAL), lambda_a * l1(self.F(fake_y), x)
            minimise({"GAN of G": gan, "cycle of G": cycle} | self._semantic("semantic of G", x, fake_y))
            fake_x = self.F(y)
            gan, cycle = squared_distance(self.D_X(self._noisy(fake_x)), REAL), lambda_b * l1(self.G(fake_x), y)
            minimise({"GAN of F": gan, "cycle of F": cycle} | self._semantic("semantic of F", y, fake_x))
            if lambda_idt > 0:
                minimise(lambda_idt * lambda_b * l1(self.G(y), y), "identity of G")
                minimise(lambda_idt * lambda_a * l1(self.F(x), x), "identity of F")
        with self.update("discriminators") as minimise:
            old_y, old_x = self.pool_y(fake_y.detach(), source.seeds), self.pool_x(fake_x.detach(), target.seeds)
            minimise(critic_loss(self.D_Y, self._noisy(y), self._noisy(old_y)), "D_Y")
            minimise(critic_loss(self.D_X, self._noisy(x), self._noisy(old_x)), "D_X")

    def _semantic(self, name: str, original: Tensor, translation: Tensor) -> dict[str, Tensor]:
        """L_sem of one direction, of pictures in [-1, 1], where there is an f_S (which takes [0, 1])."""
        if self.f_S is None:
            return {}
        classes = self.f_S((original + 1) / 2).argmax(1)
        return {name: self.config.semantic * cross_entropy(self.f_S.network((translation + 1) / 2), classes)}

    def _noisy(self, image: Tensor) -> Tensor:
        """Instance noise (Sonderby et al., ICLR 2017), so that a discriminator cannot win on fine grain alone."""
        return image + self.config.noise * torch.randn_like(image) if self.config.noise else image

    def model(self) -> Translator:
        """G on pictures of any size in [0, 1]."""
        return Translator(self.G)

    def save_model(self, path: Path) -> None:
        """Weights and settings of G in one safetensors file."""
        save_translator(path, self.model())

    @torch.no_grad()
    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures, their translations, and the way back."""
        assert batch.source is not None
        assert batch.unlabelled is not None
        to_y, to_x = Translator(self.G), Translator(self.F)
        x, y = batch.source.image, batch.unlabelled.image
        fake_y = to_y(x)
        return {"x": x, "G(x)": fake_y, "F(G(x))": to_x(fake_y), "y": y, "F(y)": to_x(y)}


def critic_loss(critic: NLayerDiscriminator, real: Tensor, fake: Tensor) -> Tensor:
    """1/2 (E[(D(real) - 1)^2] + E[D(fake)^2])."""
    return 0.5 * (squared_distance(critic(real), REAL) + squared_distance(critic(fake), FAKE))


def l1(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||_1, the mean of absolute differences."""
    return (a - b).abs().mean()


class ImagePool(nn.Module):
    """The last translations, so that a discriminator does not forget (Shrivastava et al., CVPR 2017, section 2.3).

    Until `size` pictures are kept, each is stored and returned. From then on each is returned with probability 1/2;
    else a random kept one is returned and replaced by it.
    """

    pictures: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("pictures", torch.empty(0))

    @torch.no_grad()
    def forward(self, fresh: Tensor, seeds: tuple[int, ...]) -> Tensor:
        """Exchange [B, C, H, W] one by one; the choice for a picture is a function of its seed. Gives [B, C, H, W].

        Raises:
            DataError: when the size of the pictures changes during training.
        """
        if len(self.pictures) and self.pictures.shape[1:] != fresh.shape[1:]:
            then, now = (" x ".join(map(str, t.shape[-2:])) for t in (self.pictures, fresh))
            raise DataError(f"pictures of {now} after pictures of {then}: set a crop, so that all have one size")
        result = fresh.clone()
        for place, (picture, seed) in enumerate(zip(fresh, seeds, strict=True)):
            self._exchange(picture, result[place], random.Random(seed_of(seed, "pool")))
        return result

    def _exchange(self, picture: Tensor, result: Tensor, choice: random.Random) -> None:
        """Keep or swap one picture; a kept one is written into `result`, which holds `picture`."""
        if len(self.pictures) < self.size:
            self.pictures = torch.cat([self.pictures.view(len(self.pictures), *picture.shape), picture[None]])
        elif self.size and choice.random() < 0.5:
            slot = choice.randrange(self.size)
            result.copy_(self.pictures[slot])
            self.pictures[slot] = picture

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # the pool grows while it trains: take the stored size, whatever it is here
        if (stored := state_dict.get(f"{prefix}pictures")) is not None:
            self.pictures = self.pictures.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
