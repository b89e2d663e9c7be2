"""Pipelines of diffusers as denoisers and back, and low-rank adapters."""

import copy
import json
import sys

import pytest
import torch

from limbeck.diffusion import EDM, Denoiser, Discrete, Flow, make_process, sample
from limbeck.errors import UserError
from limbeck.sampling.adapters import add_lora, has_lora, merge_lora, without_lora
from limbeck.sampling.generator import Generator, load_generator
from limbeck.zoo import build, load_model, save_model

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from limbeck.sampling.pipelines import meaning, open_pipeline, save_pipeline, scheduler_for  # noqa: E402
from limbeck.zoo.diffusers_door import SUPPORTED, DiffusersNetwork  # noqa: E402

UNET = dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
UNET |= dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8)
CONFIGS = {
    "UNet2DModel": UNET | dict(num_class_embeds=4),
    "DiTTransformer2DModel": dict(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=3,
        norm_num_groups=2,
    ),
    "UNet2DConditionModel": dict(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "PixArtTransformer2DModel": dict(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=24,
        caption_channels=12,
        norm_num_groups=2,
        use_additional_conditions=True,
    ),
    "SD3Transformer2DModel": dict(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=8,
    ),
}
PIPELINES = {
    "UNet2DModel": "DDPMPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
    "UNet2DConditionModel": "StableDiffusionPipeline",
    "PixArtTransformer2DModel": "PixArtAlphaPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
}


def told(kind, rows=4):
    rng = torch.Generator().manual_seed(1)
    if kind not in SUPPORTED[2:]:
        return None
    made = {"table": torch.randn(rows, 5, 12, generator=rng)}
    if kind == "PixArtTransformer2DModel":
        made["mask"] = (torch.arange(5)[None] < torch.tensor([[5], [3], [2], [1]])).float()
    if kind == "SD3Transformer2DModel":
        made["pooled"] = torch.randn(rows, 6, generator=rng)
    return made


def model_of(kind, **changes):
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**{**CONFIGS[kind], **changes}).eval()
    with torch.no_grad():  # nothing is zero, as in a trained network
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def usual(kind):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) if kind.startswith("SD3") else diffusers.DDPMScheduler(clip_sample=False)


def write(folder, kind, scheduler=None, **changes):
    """A pipeline folder as diffusers writes it, with the model and the scheduler."""
    part = "unet" if kind.startswith("UNet") else "transformer"
    scheduler = scheduler or usual(kind)
    model_of(kind, **changes).save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": PIPELINES[kind], "_diffusers_version": diffusers.__version__}
    index |= {part: ["diffusers", kind], "scheduler": ["diffusers", type(scheduler).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def states(made, count=3, seed=0):
    return torch.randn(count, *made.network.input_shape, generator=torch.Generator().manual_seed(seed))


# ---- the networks ----


@torch.no_grad()
@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_pipeline_is_opened_saved_and_opened_again(kind, tmp_path):
    made = open_pipeline(write(tmp_path / "pipe", kind), prompts=told(kind))
    network, model = made.network, model_of(kind)
    assert (network.kind, made.classes, network.classes, network.null_label) == (kind, 3, 3, 3)
    assert network.input_shape == (CONFIGS[kind]["in_channels"], 8, 8) and network.denoises and not network.training
    x, label = states(made, 4), torch.tensor([0, 1, 2, 3])
    time = torch.tensor([0.1, 0.4, 0.7, 1.0]) if kind.startswith("SD3") else torch.tensor([1.0, 400.0, 700.0, 999.0])
    out = network(x, time, label)
    assert out.shape == x.shape
    table = told(kind)
    if kind == "UNet2DModel":
        right = model(x, time, class_labels=label).sample
    elif kind == "DiTTransformer2DModel":
        right = model(x, timestep=time, class_labels=label).sample[:, :2]
    elif kind == "UNet2DConditionModel":
        right = model(x, time, encoder_hidden_states=table["table"]).sample
    elif kind == "PixArtTransformer2DModel":
        size = {"resolution": torch.full((4, 2), 64.0), "aspect_ratio": torch.ones(4, 1)}
        right = model(x, table["table"], time, added_cond_kwargs=size, encoder_attention_mask=table["mask"]).sample[:, :2]
    else:
        right = model(x, table["table"], table["pooled"], time * 1000).sample
    torch.testing.assert_close(out, right)
    assert not torch.allclose(network(x, time, label.flip(0)), out)  # the label is heard
    torch.testing.assert_close(network(x, time, None), network(x, time, torch.full((4,), 3)))
    save_model(network, tmp_path / "saved")
    again = load_model(tmp_path / "saved").eval()
    torch.testing.assert_close(again(x, time, label), out, rtol=0, atol=0)
    assert again.classes == 3 and again.limbeck_config == network.limbeck_config
    features, raw = made.features(x, time, label)
    assert len(features) == len(network.taps) and network.middle in network.taps
    assert all(f.is_floating_point() and len(f) == 4 for f in features)
    torch.testing.assert_close(raw, out)


@torch.no_grad()
def test_labels_are_hidden_by_the_caller_alone(tmp_path):
    network = open_pipeline(write(tmp_path, "DiTTransformer2DModel")).network.train()
    x, level = torch.randn(64, 2, 8, 8), torch.full((64,), 500.0)
    label = torch.zeros(64, dtype=torch.long)
    # diffusers' own DiT drops one label in ten while it trains
    torch.testing.assert_close(network(x, level, label), network(x, level, label), rtol=0, atol=0)


@torch.no_grad()
def test_an_unconditional_network_and_one_without_a_null_class(tmp_path):
    plain = open_pipeline(write(tmp_path / "plain", "UNet2DModel", num_class_embeds=None))
    assert plain.classes == 0 and plain.network.null_label is None
    x, t = states(plain), torch.full((3,), 300.0)
    torch.testing.assert_close(plain.raw(x, t), model_of("UNet2DModel", num_class_embeds=None)(x, t).sample)
    sure = open_pipeline(write(tmp_path / "sure", "UNet2DModel"), null=False)
    assert sure.classes == 4
    torch.testing.assert_close(sure.raw(x, t, torch.full((3,), 3)), model_of("UNet2DModel")(x, t, torch.full((3,), 3)).sample)
    with pytest.raises(UserError, match="no label that means no class"):
        sure.raw(x, t, None)


@torch.no_grad()
def test_guidance_equals_the_library_s_arithmetic(tmp_path):
    made = open_pipeline(write(tmp_path, "UNet2DConditionModel"), prompts=told("UNet2DConditionModel")).guided(3.0)
    x, t = states(made), torch.full((3,), 600.0)
    model, table = model_of("UNet2DConditionModel"), told("UNet2DConditionModel")["table"]
    yes, no = (model(x, t, encoder_hidden_states=rows).sample for rows in (table[:3], table[3:].expand(3, -1, -1)))
    torch.testing.assert_close(made.raw(x, t, torch.arange(3)), no + 3.0 * (yes - no), rtol=1e-4, atol=1e-5)


# ---- what a scheduler says ----

KINDS = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}


@torch.no_grad()
@pytest.mark.parametrize("said", sorted(KINDS))
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_clean_pictures_are_those_of_the_scheduler(said, schedule, tmp_path):
    scheduler = diffusers.DDPMScheduler(prediction_type=said, beta_schedule=schedule, clip_sample=False)
    made = open_pipeline(write(tmp_path, "UNet2DModel", scheduler))
    assert made.prediction == KINDS[said] and isinstance(made.own, Discrete) and made.code == "time"
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(1000)
    label = torch.tensor([0, 1, 3])
    for step in (0, 10, 250, 600, 900):
        x, t = states(made, seed=step), torch.full((3,), float(step))
        right = ddim.step(made.network(x, t, label), step, x, eta=0.0).pred_original_sample
        torch.testing.assert_close(made.x0(x, t, label), right, rtol=2e-4, atol=2e-4)
        p = float(scheduler.alphas_cumprod[step])
        torch.testing.assert_close(p**0.5 * right + (1 - p) ** 0.5 * made.noise(x, t, label), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "PNDMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"],
)
def test_every_scheduler_says_its_own_products(name):
    scheduler = getattr(diffusers, name)(beta_start=2e-4, beta_end=0.015, prediction_type="v_prediction")
    said = meaning({**scheduler.config, "_class_name": name})
    torch.testing.assert_close(torch.tensor(said["process"].products), scheduler.alphas_cumprod)
    assert said["prediction"] == "v" and said["time_scale"] == 1.0


@torch.no_grad()
def test_a_flow_is_the_flow_of_the_scheduler(tmp_path):
    made = open_pipeline(write(tmp_path, "SD3Transformer2DModel"), prompts=told("SD3Transformer2DModel"))
    assert made.own == Flow(3.0) and made.prediction == "velocity" and made.network.time_scale == 1000
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    times = made.process.times(4)
    torch.testing.assert_close(times, scheduler.sigmas)  # the same grid
    x = start = states(made)
    label = torch.tensor([0, 1, 3])
    table = told("SD3Transformer2DModel")
    model = model_of("SD3Transformer2DModel")
    for t in scheduler.timesteps:
        out = model(x, table["table"][label], table["pooled"][label], t.expand(3)).sample
        x = scheduler.step(out, t, x).prev_sample
    torch.testing.assert_close(sample(made, start, label, sampler="euler", times=times), x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_edm_is_preconditioned_as_the_scheduler_does(tmp_path):
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.7, sigma_max=60.0)
    made = open_pipeline(write(tmp_path, "UNet2DModel", scheduler))
    assert isinstance(made.own, EDM) and made.own.highest == 60.0 and made.sigma_data == 0.7
    scheduler.set_timesteps(5)
    x, model, label = 60 * states(made), model_of("UNet2DModel"), torch.tensor([0, 1, 3])
    for number, t in enumerate(scheduler.timesteps):
        out = model(scheduler.scale_model_input(x, t), t.expand(3), class_labels=label).sample
        right = scheduler.step(out, t, x)
        seen = made.x0(x, scheduler.sigmas[number].expand(3), label)
        torch.testing.assert_close(seen, right.pred_original_sample, rtol=1e-4, atol=1e-4)
        x = right.prev_sample


@torch.no_grad()
@pytest.mark.parametrize("steps", [4, 10])
def test_ddim_is_the_library_s(steps, tmp_path):
    made = open_pipeline(write(tmp_path, "UNet2DModel", num_class_embeds=None))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = start = states(made)
    for t in scheduler.timesteps:
        x = scheduler.step(made.network.model(x, t).sample, t, x, eta=0.0).prev_sample
    times = torch.cat([scheduler.timesteps.float(), torch.tensor([-1.0])])
    ours = sample(made, start, None, sampler="ddim", times=times)
    assert float((ours - x).abs().max()) < 1e-4 * max(1.0, float(x.abs().max()))
    torch.testing.assert_close(times, made.process.times(steps))  # trailing steps are the uniform ones


# ---- text ----


def text_pipeline(folder):
    """A StableDiffusionPipeline with a tiny text encoder and a tokenizer of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=7)
    torch.manual_seed(0)
    size = len(letters)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, sample_size=8)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        unet=model_of("UNet2DConditionModel"),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipe")
    return folder / "pipe"


@torch.no_grad()
def test_prompts_go_through_the_pipeline_s_own_encoder(tmp_path):
    folder = text_pipeline(tmp_path / "text")
    made = open_pipeline(folder, prompts=["ab", "cd e"])
    assert made.classes == 2 and made.network.table.shape == (3, 7, 12)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    right, none = pipeline.encode_prompt(["cd e"], "cpu", 1, True)
    torch.testing.assert_close(made.network.table[1:], torch.cat([right, none]))
    assert not torch.allclose(made.network.table[0], made.network.table[1])
    # and the student goes back into a whole pipeline, the other components copied
    student = made.with_network(copy.deepcopy(made.network))
    for parameter in student.network.parameters():
        parameter.mul_(1.1)
    save_pipeline(student, tmp_path / "out")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "StableDiffusionPipeline" and isinstance(again.scheduler, diffusers.LCMScheduler)
    x, t = states(made), torch.full((3,), 700.0)
    torch.testing.assert_close(again.unet(x, t, made.network.table).sample, student.network(x, t, torch.arange(3)))
    out = again("ab", num_inference_steps=2, guidance_scale=1.0, output_type="latent", height=8, width=8, latents=x[:1])
    assert torch.isfinite(out.images).all()
    opened = open_pipeline(tmp_path / "out", prompts=["ab", "cd e"])
    torch.testing.assert_close(opened.x0(x, t, torch.arange(3)), student.x0(x, t, torch.arange(3)))
    # a component that the teacher's folder lost: the model and its scheduler only
    (folder / "vae").rename(folder / "elsewhere")
    save_pipeline(student, tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists() and (tmp_path / "out" / "unet" / "config.json").is_file()


# ---- writing ----


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_renoising_student_is_sampled_alike_by_its_pipeline(steps, tmp_path):
    made = open_pipeline(write(tmp_path / "in", "UNet2DModel", num_class_embeds=None))
    save_pipeline(made, tmp_path / "out")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline.scheduler, diffusers.LCMScheduler) and type(pipeline).__name__ == "DDPMPipeline"
    x, t = states(made), torch.full((3,), 400.0)
    torch.testing.assert_close(pipeline.unet(x, t).sample, made.network(x, t), rtol=0, atol=0)
    theirs = pipeline(3, torch.Generator().manual_seed(5), steps, output_type="np").images
    rng = torch.Generator().manual_seed(5)
    noise = torch.randn(3, 1, 8, 8, generator=rng)
    ours = sample(made, noise, None, sampler="renoise", times=made.process.times(steps), rng=rng)
    pictures = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(pictures - theirs).max() < 2e-3 and theirs.std() > 0.05


@torch.no_grad()
def test_schedulers_of_students(tmp_path):
    made = open_pipeline(write(tmp_path, "UNet2DModel", diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")))
    for sampler, name in (("renoise", "LCMScheduler"), ("ddim", "DDIMScheduler")):
        scheduler = scheduler_for(made, sampler)
        assert type(scheduler).__name__ == name
        torch.testing.assert_close(scheduler.alphas_cumprod, torch.tensor(made.own.products), rtol=1e-4, atol=1e-9)
    flow = Denoiser(made.network, Flow(2.0), "velocity")
    assert scheduler_for(flow).config.stochastic_sampling and not scheduler_for(flow, "euler").config.stochastic_sampling
    assert scheduler_for(Denoiser(made.network, EDM(), "edm", sigma_data=0.3)).config.sigma_data == 0.3
    with pytest.raises(UserError, match="no scheduler for 'v' prediction under the process 'trig'"):
        scheduler_for(Denoiser(made.network, make_process("trig"), "v"))


@torch.no_grad()
def test_a_generator_is_saved_and_loaded(tmp_path):
    made = open_pipeline(write(tmp_path / "in", "UNet2DModel"))
    generator = Generator(made, (1, 8, 8), options={"grid": "uniform"})
    generator.save(tmp_path / "out")
    again = load_generator(tmp_path / "out")
    assert isinstance(again.denoiser.network, DiffusersNetwork)
    torch.testing.assert_close(again.sample(4, 2, 7), generator.sample(4, 2, 7), rtol=0, atol=0)
    opened = open_pipeline(tmp_path / "out" / "pipeline")
    x, t = states(made), torch.full((3,), 700.0)
    torch.testing.assert_close(opened.x0(x, t, torch.arange(3)), made.x0(x, t, torch.arange(3)), rtol=1e-4, atol=1e-4)
    other = Generator(Denoiser(made.network, make_process("trig"), "v", classes=3), (1, 8, 8))
    other.save(tmp_path / "trig")  # diffusers knows no such process
    assert load_generator(tmp_path / "trig").sample(2).shape == (2, 1, 8, 8) and not (tmp_path / "trig" / "pipeline").exists()


# ---- adapters ----


def networks():
    dit = build("dit", input_shape=(1, 8, 8), classes=3)
    torch.manual_seed(0)
    for parameter in dit.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    unet = DiffusersNetwork("UNet2DModel", CONFIGS["UNet2DModel"], model=model_of("UNet2DModel"))
    return {"dit": (dit, None), "diffusers": (unet, None), "convolutions": (copy.deepcopy(unet), ("to_q", "conv1"))}


@pytest.mark.parametrize("name", ["dit", "diffusers", "convolutions"])
def test_adapters_learn_alone_and_merge(name, tmp_path):
    network, targets = networks()[name]
    network.eval()
    network.get_parameter(next(n for n, _ in network.named_parameters())).requires_grad_(False)
    plain, kind, asked = copy.deepcopy(network), type(network), [p.requires_grad for p in network.parameters()]
    x, level, label = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.4, 0.7, 1.0]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        right = plain(x, level, label)
    made = add_lora(network, 2, 4.0, targets)
    assert made is network and has_lora(made) and type(made) is kind
    learning = {n for n, p in made.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in n for n in learning)
    if name == "convolutions":
        assert any("conv1" in n for n in learning) and not any("to_k" in n for n in learning)
    with torch.no_grad():
        torch.testing.assert_close(made(x, level, label), right, rtol=0, atol=1e-6)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        made(x, level, label).sub(1.0).square().mean().backward()
        optimizer.step()
    base = {n.replace(".base_layer", ""): p for n, p in made.named_parameters() if "lora_" not in n}
    assert all(torch.equal(base[n], p) for n, p in plain.named_parameters()) and len(base) == len(list(plain.parameters()))
    with torch.no_grad():
        moved = made(x, level, label)
        assert float((moved - right).abs().max()) > 1e-3
        frozen = [p.requires_grad for p in made.parameters()]
        with without_lora(made) as teacher:
            torch.testing.assert_close(teacher(x, level, label), right, rtol=0, atol=1e-6)
        assert [p.requires_grad for p in made.parameters()] == frozen
        torch.testing.assert_close(made(x, level, label), moved, rtol=0, atol=0)
        merged = merge_lora(made)
        assert type(merged) is kind and not has_lora(merged) and has_lora(made)
        assert [p.requires_grad for p in merged.parameters()] == asked
        torch.testing.assert_close(merged(x, level, label), moved, rtol=1e-4, atol=1e-5)
        save_model(merged, tmp_path)
        torch.testing.assert_close(load_model(tmp_path).eval()(x, level, label), merged(x, level, label), rtol=0, atol=0)
        if name == "diffusers":
            denoiser = Denoiser(made, make_process("ddpm"), "noise", classes=3, code="time")
            save_pipeline(denoiser, tmp_path / "pipe")
            torch.testing.assert_close(open_pipeline(tmp_path / "pipe").network(x, level, label), merged(x, level, label))


def test_adapters_skip_what_is_never_called_and_say_what_is_wrong(monkeypatch):
    attention = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.MultiheadAttention(4, 1))
    add_lora(attention, 1)
    assert hasattr(attention[0], "lora_A") and not hasattr(attention[1].out_proj, "lora_A")
    with pytest.raises(UserError, match="adapters already"):
        add_lora(attention, 1)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(UserError, match="matches to_q"):
        add_lora(plain, 1, targets=("to_q",))
    with pytest.raises(UserError, match="any Linear"):
        add_lora(torch.nn.Sequential(torch.nn.ReLU()), 1)
    with pytest.raises(UserError, match="rank 0"):
        add_lora(plain, 0)
    with pytest.raises(UserError, match="no adapters to merge"):
        merge_lora(plain)
    with pytest.raises(UserError, match="no adapters to leave out"), without_lora(plain):
        pass
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft is not installed.*limbeck\[diffusers\]"):
        add_lora(plain, 1)


# ---- errors ----


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        open_pipeline(*args, **kwargs)
    assert caught.value.hint and "\n" not in caught.value.message


def test_errors_of_folders(tmp_path, monkeypatch):
    refused("no folder at", "/no/such/folder")
    (tmp_path / "empty").mkdir()
    refused("no config.json", tmp_path / "empty", scheduler="DDPMScheduler")
    folder = write(tmp_path / "pipe", "UNet2DModel")
    refused("no config.json", folder, subfolder="elsewhere")
    refused("has no scheduler", write(tmp_path / "bare", "UNet2DModel").joinpath("unet").rename(tmp_path / "moved"))
    assert isinstance(open_pipeline(tmp_path / "moved", scheduler="DDIMScheduler").own, Discrete)
    assert open_pipeline(tmp_path / "moved", scheduler=folder / "scheduler").prediction == "noise"
    assert open_pipeline(folder / "unet").own == open_pipeline(folder).own  # the scheduler beside it
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    assert open_pipeline(folder, scheduler=flow).own == Flow(2.0)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused("weights of .* cannot be read", folder)
    torch.save(model_of("UNet2DModel").state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    refused("weights of .* cannot be read", folder)  # a pickle is not read
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Odd"}))
    refused("no unet or transformer", folder)
    (folder / "model_index.json").write_text("{")
    refused("cannot be read", folder)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused("diffusers is not installed.*limbeck\\[diffusers\\]", folder)


def test_an_id_of_the_hub_without_the_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("nobody/nothing is no folder here, and the hub cannot be reached", "nobody/nothing")


def test_errors_of_models_and_schedulers(tmp_path):
    folder = write(tmp_path / "pipe", "UNet2DModel")
    refused("rescale_betas_zero_snr", folder, scheduler={"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True})
    refused("rescale_betas_zero_snr", folder, scheduler={"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True})
    refused("VQDiffusionScheduler is not supported", folder, scheduler="VQDiffusionScheduler")
    refused(
        "prediction_type 'flow_prediction'",
        folder,
        scheduler={"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
    )
    refused(
        "EDMEulerScheduler with prediction_type", folder, scheduler={"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}
    )
    refused("holds no scheduler_config", folder, scheduler=folder / "unet")
    config = folder / "unet" / "config.json"
    own = json.loads(config.read_text())
    config.write_text(json.dumps({**own, "_class_name": "UNet1DModel"}))
    refused("UNet1DModel of diffusers cannot be read.*UNet2DModel", folder)
    with pytest.raises(UserError, match="class_embed_type"):
        DiffusersNetwork("UNet2DModel", {**UNET, "class_embed_type": "timestep"})
    with pytest.raises(UserError, match="reads 1 channels and gives 3"):
        DiffusersNetwork("UNet2DModel", {**UNET, "out_channels": 3})
    with pytest.raises(UserError, match="cannot make"):
        DiffusersNetwork("UNet2DModel", {**UNET, "down_block_types": ("Nonsense", "DownBlock2D")})
    with pytest.raises(UserError, match="no network of diffusers"):
        save_pipeline(Denoiser(torch.nn.Linear(1, 1), Flow()), tmp_path / "out")
    with pytest.raises(UserError, match="no pipeline's folder"):
        save_pipeline(open_pipeline(write(tmp_path / "fine", "UNet2DModel")), tmp_path / "out", like=tmp_path / "nowhere")


def test_errors_of_prompts(tmp_path):
    refused("is told no text", write(tmp_path / "unet", "UNet2DModel"), prompts=["a"])
    folder = write(tmp_path / "pixart", "PixArtTransformer2DModel")
    refused("no prompts were given", folder)
    refused("no text encoder", folder, prompts=["a", "b"])
    refused("no list of texts", folder, prompts=[1, 2])
    refused("one text", folder, prompts="a cat")
    table = told("PixArtTransformer2DModel")
    refused("embeddings mask are missing", folder, prompts={"table": table["table"]})
    refused("different numbers of rows", folder, prompts={**table, "mask": table["mask"][:2]})
    refused("embeddings 'table' are", folder, prompts={**table, "table": table["table"][0]})
    from limbeck.storage import save_tensors

    save_tensors(tmp_path / "told.safetensors", table)
    assert torch.equal(open_pipeline(folder, prompts=tmp_path / "told.safetensors").network.table, table["table"])
    text = text_pipeline(tmp_path / "text")
    (text / "text_encoder").rename(text / "gone")
    refused("names the text encoder text_encoder", text, prompts=["a"])


def test_a_component_cannot_lie_outside_the_folder(tmp_path):
    """A hostile index does not make save_pipeline write elsewhere."""
    from limbeck.sampling.pipelines import _copied

    (tmp_path / "evil").mkdir()
    (tmp_path / "like").mkdir()
    with pytest.raises(UserError, match="outside its folder"):
        _copied(tmp_path / "like", tmp_path / "a" / "out", {"../evil": ["diffusers", "X"]}, "unet")
