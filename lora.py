"""LoRA on Llama's projections; PEFT adapters in and out; merging, as functions and as a script.

        x [.., K] -----> W [N, K], frozen -----------------------> + ---> y [.., N]
           |                                                       ^
           +--> dropout --> A [r, K] --> P [.., r] --> B [N, r] --> * alpha/r

    python lora.py --base=FOLDER --adapter=FOLDER --out=FOLDER      # writes a merged model folder

Projections that read the same input are one matrix W (model.GROUPS); their adapters act on row
slices of it, so x is read once. The backward pass is written by hand: it keeps x, P and seeds, and
draws the dropout masks again. A and B are fp32 and are rounded to x's dtype where they are used.
"""
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from model import GROUPS, PROJECTIONS, Llama, Projection, compare_names, fill, open_weights, full_tensor
from runtime import read_object

# ----------------------------------------------------------------------------- knobs of the script
base = ""           # model folder the adapter was trained on
adapter = ""        # PEFT adapter folder
out = ""            # folder to write the merged model to
dtype = "float32"   # dtype of the merged weights; bf16 rounds away small updates, the share lost is printed
_choices = {"dtype": ("float32", "bfloat16", "float16")}

TARGETS = {"all": PROJECTIONS, "attention": PROJECTIONS[:4], "mlp": PROJECTIONS[4:]}


# ----------------------------------------------------------------------------- the matmul
def keep_mask(seed, like, drop, again=False):
    """Boolean mask of like's shape, False with probability drop / 2^32: a function of the seed, int32 [2], alone.

    Each element hashes its index, by Wellons' lowbias32 (github.com/skeeto/hash-prospector) with the second half of
    the seed mixed in after its first shift. Plain integer operators, so that torch.compile draws a mask where it is used, without
    storing it, and every device draws the same. In backward say `again`: it changes nothing but the way there, else
    the compiler would see what it computed in forward and keep all masks until then."""
    h = torch.arange(again, again + like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    if again:
        h.sub_(1)
    h.mul_(-0x61C88647).add_(seed[0])
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).add_(seed[1]).mul_(0x21F0AAAD)  # "and" makes the shift logical
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF)).mul_(0x735A2D97)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF))
    return h >= drop - 2 ** 31


@torch.library.custom_op("lora::matmul_add", mutates_args=())
def matmul_add(x: torch.Tensor, W: torch.Tensor, P: torch.Tensor, B: torch.Tensor, starts: list[int], ends: list[int],
               scale: float) -> torch.Tensor:
    """x W^T, plus scale P_i B_i^T on the columns of each span; P holds the P_i side by side, B the B_i stacked.

    An operator of its own because torch.compile would turn the additions in place into copies."""
    y, rank = x @ W.T, B.shape[1]
    lengths = [end - start for start, end in zip(starts, ends)]
    for start, end, P_i, B_i in zip(starts, ends, P.split(rank, 1), B.split(lengths)):
        y[:, start:end].addmm_(P_i, B_i.T, alpha=scale)
    return y


@matmul_add.register_fake
def _(x, W, P, B, starts, ends, scale):
    return x.new_empty((x.shape[0], W.shape[0]))


class LoRAMatmul(torch.autograd.Function):
    """y = x W^T, plus on the rows of each span: scale * dropout(x) A_i^T B_i^T.

    x [T, K]; W [N, K] frozen; A [n r, K], B [rows of all spans, r]; spans ((start, end), ...) rows of y
    in the order of A and B; p dropout probability, an own mask for each span as PEFT, from seeds
    int32 [spans, 2]."""

    @staticmethod
    def forward(ctx, x, W, A, B, spans, scale, p, seeds):
        a = A.to(x.dtype)
        drop = round(p * 2 ** 32)
        scale = scale / (1 - drop / 2 ** 32)
        if drop:
            P = torch.cat([(x * keep_mask(seed, x, drop)) @ a_i.T for seed, a_i in zip(seeds, a.split(B.shape[1]))], 1)
        else:
            P = x @ a.T
        y = matmul_add(x, W, P, B.to(x.dtype), [s for s, _ in spans], [e for _, e in spans], scale)
        ctx.save_for_backward(x, W, A, B, P, seeds)
        ctx.spans, ctx.scale, ctx.drop = spans, scale, drop
        return y

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, P, seeds = ctx.saved_tensors
        spans, rank = ctx.spans, B.shape[1]
        a, b = adapter_parts(A, B, spans, x.dtype)
        parts = [dy[:, start:end] for start, end in spans]
        dP = [(part @ b_i).mul_(ctx.scale) for part, b_i in zip(parts, b)]  # Q of the papers: [T, r] each
        dB = torch.cat([part.T @ P_i for part, P_i in zip(parts, P.split(rank, 1))]).to(B.dtype).mul_(ctx.scale)
        dx = dy @ W if ctx.needs_input_grad[0] else None
        if not ctx.drop:
            stacked = torch.cat(dP, 1)
            dA = (stacked.T @ x).to(A.dtype)
            if dx is not None:
                dx.addmm_(stacked, A.to(x.dtype))
            return dx, None, dA, dB, None, None, None, None
        keep = [keep_mask(seed, x, ctx.drop, again=True) for seed in seeds]
        dA = torch.cat([dP_i.T @ (x * keep_i) for dP_i, keep_i in zip(dP, keep)]).to(A.dtype)
        if dx is not None:
            for dP_i, a_i, keep_i in zip(dP, a, keep):
                dx += (dP_i @ a_i).mul_(keep_i)
        return dx, None, dA, dB, None, None, None, None


def lora_matmul(kernel, x, W, A, B, spans, scale, p, seeds):
    """LoRAMatmul's value by kernel 'torch', or by those of llama/lora_kernels.py, with the low-rank term 'fused' into the product
    with W or 'added' to it."""
    if kernel == "torch":
        return LoRAMatmul.apply(x, W, A, B, spans, scale, p, seeds)
    drop = round(p * 2 ** 32)
    return torch.ops.lora.matmul(x, W, A, B, seeds if drop else None, [s for s, _ in spans], [e for _, e in spans],
                                  scale / (1 - drop / 2 ** 32), drop, kernel == "fused")[0]


def adapter_parts(A, B, spans, dtype):
    """The A_i [r, K] and B_i [rows_i, r] of each span, in the dtype of the matmul."""
    return A.to(dtype).split(B.shape[1]), B.to(dtype).split([end - start for start, end in spans])


class LoRAProjection(nn.Module):
    """A Projection with adapters on some of its parts."""

    def __init__(self, projection, adapted, rank, scale, dropout):
        super().__init__()
        self.parts, self.adapted, self.rank, self.kernel = projection.parts, adapted, rank, "torch"
        self.scale, self.dropout, self.weight = scale, dropout, projection.weight
        ends = torch.tensor(list(self.parts.values())).cumsum(0).tolist()
        self.spans = tuple((end - self.parts[name], end) for name, end in zip(self.parts, ends) if name in adapted)
        like = dict(device=self.weight.device, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        K = self.weight.shape[1]
        self.lora_A = nn.Parameter(torch.empty(len(adapted) * rank, K, **like))
        self.lora_B = nn.Parameter(torch.empty(sum(end - start for start, end in self.spans), rank, **like))

    def forward(self, x):
        p = self.dropout if self.training else 0.0
        seeds = torch.randint(-2 ** 31, 2 ** 31, (len(self.adapted), 2), dtype=torch.int32) if p else None
        y = lora_matmul(self.kernel, x.flatten(0, -2), self.weight.to(x.dtype), self.lora_A, self.lora_B,
                        self.spans, self.scale, p, seeds)
        return y.view(*x.shape[:-1], -1)

    def init_weights(self):
        """PEFT's: A kaiming_uniform(a=sqrt(5)), which is U(-1, 1) / sqrt(K); B = 0, so the start is the base."""
        bound = self.lora_A.shape[1] ** -0.5  # drawn whole on the CPU: the same for any device and sharding
        fill(self.lora_A, torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype).uniform_(-bound, bound))
        fill(self.lora_B, torch.zeros(self.lora_B.shape, dtype=self.lora_B.dtype))

    def deltas(self):
        """Projection name -> its weight change scale * B A, [rows, K], in the dtype of A and B."""
        a, b = adapter_parts(self.lora_A, self.lora_B, self.spans, self.lora_A.dtype)
        return {name: self.scale * (b_i @ a_i) for name, a_i, b_i in zip(self.adapted, a, b)}


# ----------------------------------------------------------------------------- models with adapters
def resolve_targets(targets):
    """'all', 'attention', 'mlp', or projection names (a list, or text with commas) -> tuple of names."""
    if isinstance(targets, str):
        targets = TARGETS.get(targets, tuple(t.strip() for t in targets.split(",")))
    unknown = [t for t in targets if t not in PROJECTIONS]
    if unknown or not targets:
        raise ValueError(f"lora_targets: found {', '.join(unknown) or 'none'}; expected {', '.join(TARGETS)} or some of "
                         f"{', '.join(PROJECTIONS)}")
    return tuple(targets)


def apply_lora(model, rank, alpha, dropout=0.0, targets="all", rslora=False, chosen=None):
    """Freeze the model and put adapters on the targets of every block, in place; returns the model.

    The scale is alpha / rank, or alpha / sqrt(rank) with rslora. `chosen(layer, name)` may leave out
    some of the targets (adapters on a part of the blocks). On a model on meta, init_adapters must follow, once it is
    somewhere. Raises ValueError for impossible values."""
    names = resolve_targets(targets)
    if rank < 1 or not alpha > 0 or not 0 <= dropout <= 0.99:
        raise ValueError(f"LoRA needs rank >= 1, alpha > 0 and 0 <= dropout <= 0.99, found {rank}, {alpha}, {dropout}")
    if any(isinstance(m, LoRAProjection) for m in model.modules()):
        raise ValueError("the model already has adapters")
    model.requires_grad_(False)
    for layer, block in enumerate(model.layers):
        for module in (block.self_attn, block.mlp):
            for group in GROUPS:
                adapted = [n for n in GROUPS[group] if n in names and (chosen is None or chosen(layer, n))]
                if hasattr(module, group) and adapted:
                    scale = alpha / (rank ** 0.5 if rslora else rank)
                    setattr(module, group, LoRAProjection(getattr(module, group), adapted, rank, scale, dropout))
                    if not getattr(module, group).weight.is_meta:
                        getattr(module, group).init_weights()
    model.lora = dict(rank=rank, alpha=alpha, dropout=dropout, targets=names, rslora=rslora)
    return model


def init_adapters(model):
    """New A and B for every adapter, from torch's random state."""
    for module in model.modules():
        if isinstance(module, LoRAProjection):
            module.init_weights()


def adapters(model):
    """Yield (published module path, LoRAProjection, index of the adapter in it) for every adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoRAProjection):
            for i, name in enumerate(module.adapted):
                yield f"model.{path.rsplit('.', 1)[0]}.{name}", module, i


def merge_lora(model):
    """Add every adapter to its weight in fp32 (or better), round once, and drop the adapters; in place."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, LoRAProjection):
            continue
        with torch.no_grad():
            for (start, end), delta in zip(module.spans, module.deltas().values()):
                module.weight[start:end] = (module.weight[start:end].to(delta.dtype) + delta).to(module.weight.dtype)
        plain = Projection.__new__(Projection)
        nn.Module.__init__(plain)
        plain.parts, plain.weight = module.parts, module.weight
        parent, name = path.rsplit(".", 1)
        setattr(model.get_submodule(parent), name, plain)
    del model.lora
    return model


def known_by(model):
    """The parameters that a base is known by."""
    return model.norm.weight, model.embed_tokens.weight, model.layers[0].self_attn.qkv_proj.weight


def fingerprint(model, get=full_tensor):
    """Tells bases apart, loaded in bf16 or better; under FSDP all ranks must ask for it."""
    return fingerprint_of(*map(get, known_by(model)))


def fingerprint_of(norm, embedding, qkv):
    """sha256 of the last norm, and of the first 64 rows of the embedding and of the first block's qkv_proj, in bf16."""
    digest = hashlib.sha256()
    for w in (norm, embedding[:64], qkv[:64]):
        digest.update(w.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------- which kernel
def milliseconds(run, repeats=10):
    """Median time of run() on the GPU, after three rounds to warm up."""
    times = []
    for _ in range(3 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


def time_kernel(kernel, shape, spans, rank, p, rows, dtype, device, compiled):
    """Milliseconds of forward and backward of one projection group, with random operands."""
    N, K = shape
    x, W, dy = (torch.randn(size, device=device, dtype=dtype) for size in ((rows, K), (N, K), (rows, N)))
    x.requires_grad_()
    sizes = (len(spans) * rank, K), (sum(end - start for start, end in spans), rank)
    A, B = (torch.randn(size, device=device, requires_grad=True) for size in sizes)
    seeds = torch.zeros(len(spans), 2, dtype=torch.int32)
    torch.compiler.reset()  # or the compiler gives up: every group and kernel is a variant of one function to it
    matmul = torch.compile(lora_matmul, dynamic=False) if compiled else lora_matmul
    return milliseconds(lambda: torch.autograd.grad(matmul(kernel, x, W, A, B, spans, 2.0, p, seeds), (x, A, B), dy))


def choose_kernel(model, kernel, rows, dtype, device, compiled=False):
    """Set what every adapter computes with, for `rows` tokens at once; returns lines that say so.

    'torch'; 'triton': the kernels of llama/lora_kernels.py, 'fused' or 'added' as measured; 'auto': the fastest of the three.
    Raises ValueError when the kernels are asked for and cannot run."""
    if kernel == "torch" or kernel == "auto" and device.type == "cpu":
        return []
    try:
        from llama import lora_kernels
        lora_kernels.check(dtype, device)
    except (ImportError, ValueError) as e:
        if kernel == "auto":
            return [f"lora_kernel: torch ({e})"]
        raise ValueError(f"lora_kernel=triton: Triton is not installed ({e})" if isinstance(e, ImportError) else e) from None
    modules = [m for m in model.modules() if isinstance(m, LoRAProjection)]
    key_of = lambda m: (tuple(m.weight.shape), m.spans, m.rank, m.dropout)
    times = {}
    for key in dict.fromkeys(map(key_of, modules)):
        names = ("fused", "added") if kernel == "triton" else ("torch", "fused", "added")
        times[key] = ({name: time_kernel(name, *key, rows, dtype, device, compiled) for name in names}
                      if device.type == "cuda" else {"fused": math.nan})  # Triton's interpreter has no times
    if dist.is_initialized():  # rank 0's, so that all ranks do the same
        box = [times]
        dist.broadcast_object_list(box)
        times, = box
    for m in modules:
        m.kernel = min(times[key_of(m)], key=times[key_of(m)].get)
    return [f"lora_kernel: {N} x {K}, {len(spans)} adapters of rank {rank}: {min(found, key=found.get)}; ms of forward and "
            f"backward: " + ", ".join(f"{name} {ms:.3f}" for name, ms in found.items())
            for ((N, K), spans, rank, _), found in times.items()]


# ----------------------------------------------------------------------------- PEFT folders
def adapter_tensors(model):
    """PEFT tensor name -> (the parameter of ours that holds it, its first row there, its rows)."""
    tensors = {}
    for path, module, i in adapters(model):
        rows, before = [end - start for start, end in module.spans], [0]
        for n in rows:
            before.append(before[-1] + n)
        tensors[f"base_model.model.{path}.lora_A.weight"] = module.lora_A, i * module.rank, module.rank
        tensors[f"base_model.model.{path}.lora_B.weight"] = module.lora_B, before[i], rows[i]
    return tensors


def save_adapter(model, folder, base_name="", get=full_tensor):
    """Write adapter_config.json and adapter_model.safetensors as peft 0.11.1 names them.

    get(parameter) is the tensor to write, by default the parameter as it is now."""
    lora, paths = model.lora, [path for path, _, _ in adapters(model)]
    everywhere = len(paths) == len(lora["targets"]) * len(model.layers)  # else name the modules one by one
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
              "r": lora["rank"], "lora_alpha": lora["alpha"], "lora_dropout": lora["dropout"],
              "target_modules": list(lora["targets"]) if everywhere else paths, "use_rslora": lora["rslora"], "use_dora": False,
              "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
              "modules_to_save": None, "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}}
    tensors = {name: get(p)[first:first + rows].to("cpu", copy=True)
               for name, (p, first, rows) in adapter_tensors(model).items()}
    metadata = {"format": "pt", "base_fingerprint": fingerprint(model, get)}
    if dist.is_initialized() and dist.get_rank() != 0:  # under FSDP all ranks gather, one writes
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(tensors, folder / "adapter_model.safetensors", metadata)


def is_adapter(folder):
    """Whether a folder is a PEFT adapter's."""
    return (Path(folder) / "adapter_config.json").is_file()


def read_adapter_config(folder):
    """(rank, alpha, dropout, rslora, chosen) of a PEFT folder; chosen(layer, projection) -> adapted?

    Raises FileNotFoundError, or ValueError for what this LoRA does not compute."""
    path = Path(folder) / "adapter_config.json"
    config = read_object(path, "an adapter folder holds it and adapter_model.safetensors")
    for key, allowed in (("peft_type", ("LORA",)), ("use_dora", (None, False)), ("fan_in_fan_out", (None, False)),
                         ("bias", (None, "none")), ("modules_to_save", (None, [])), ("rank_pattern", (None, {})),
                         ("alpha_pattern", (None, {})), ("layer_replication", (None, [])),
                         ("exclude_modules", (None, [])), ("alora_invocation_tokens", (None, [])),
                         # the other inits (pissa, olora, loftq ...) change the base's weights as well
                         ("init_lora_weights", (None, False, "gaussian", "eva", "orthogonal", True))):
        if config.get(key) not in allowed:
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; only {allowed[-1]!r} is supported")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    wanted, layers = config["target_modules"], config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers

    def chosen(layer, name):
        if layers is not None and layer not in layers:
            return False
        full = f"model.layers.{layer}.{'self_attn' if name in TARGETS['attention'] else 'mlp'}.{name}"
        if isinstance(wanted, str):  # PEFT: a regex over the whole name, or one special word
            return wanted == "all-linear" or re.fullmatch(wanted, full) is not None
        return any(full == t or full.endswith("." + t) for t in wanted)

    if isinstance(wanted, list):
        if unknown := [t for t in wanted if t.split(".")[-1] not in PROJECTIONS]:
            raise ValueError(f"{path}: target_modules {', '.join(unknown)} unsupported; "
                             f"adapters go on {', '.join(PROJECTIONS)}")
    return config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), config.get("use_rslora", False), chosen


def load_adapter(model, folder):
    """Put the adapters of a PEFT folder on a plain model, in place; returns the model.

    Raises FileNotFoundError, or ValueError as apply_saved_lora and load_adapter_weights do."""
    return load_adapter_weights(apply_saved_lora(model, folder), folder)


def apply_saved_lora(model, folder):
    """apply_lora with the settings of a PEFT folder; raises ValueError when they are not supported or fit nothing."""
    rank, alpha, dropout, rslora, chosen = read_adapter_config(folder)
    names = [n for n in PROJECTIONS if any(chosen(layer, n) for layer in range(len(model.layers)))]
    if not names:
        raise ValueError(f"{folder}: target_modules of adapter_config.json match no projection of this model")
    return apply_lora(model, rank, alpha, dropout, names, rslora, chosen)


def open_adapter_weights(folder, expected, base_fingerprint):
    """{name: open file} of a PEFT folder; expected {name: shape}, base_fingerprint() of the base in hand.

    Raises ValueError when a tensor is missing, unexpected or misshaped, or was trained on another base."""
    shapes, where = open_weights(folder, "adapter_model.safetensors")
    trained_on = next((file.metadata() or {} for file in where.values()), {}).get("base_fingerprint")
    if trained_on and trained_on != base_fingerprint():
        raise ValueError(f"{folder}: this adapter was trained on another base model")
    if problems := compare_names(expected, shapes):
        raise ValueError(f"{folder}: adapter does not fit this model: {problems}")
    return where


@torch.no_grad()
def load_adapter_weights(model, folder):
    """Fill the adapters of a model from a PEFT folder; returns the model. Raises as open_adapter_weights."""
    tensors = adapter_tensors(model)
    where = open_adapter_weights(Path(folder), {name: (rows, p.shape[1]) for name, (p, _, rows) in tensors.items()},
                                 lambda: fingerprint(model))
    pieces = {}  # parameter -> its adapters' tensors, in row order
    for name, (p, _, _) in tensors.items():
        pieces.setdefault(p, []).append(where[name].get_tensor(name))
    for p, parts in pieces.items():
        fill(p, torch.cat(parts))
    return model


# ----------------------------------------------------------------------------- the script
def lost_to_rounding(model, dtype):
    """Share |round(W + D) - (W + D)| / |D| of the adapters' change D that storing in `dtype` rounds away."""
    lost = total = 0.0
    for module in {id(m): m for _, m, _ in adapters(model)}.values():
        for (start, end), delta in zip(module.spans, module.deltas().values()):
            exact = module.weight[start:end] + delta
            lost += (exact.to(dtype).to(exact.dtype) - exact).square().sum().item()
            total += delta.square().sum().item()
    return (lost / total) ** 0.5 if total else 0.0


@torch.inference_mode()
def merge_folders(base, adapter, out, dtype):
    """Write base + adapter to the folder `out` in `dtype`, and prove that it computes the same.

    Returns (largest logit difference of the written model, largest logit, share lost to rounding).
    Raises ValueError, leaving nothing under `out`, when merged and unmerged logits disagree."""
    if Path(out).exists():
        raise ValueError(f"{out}: exists already")
    model = load_adapter(Llama.from_pretrained(base), adapter).eval()
    tokens = torch.randint(model.config.vocab_size, (1, min(64, model.config.max_position_embeddings)),
                           generator=torch.Generator().manual_seed(0))
    want = model(tokens)[0]
    lost, largest = lost_to_rounding(model, dtype), want.abs().max().item()
    merge_lora(model)
    in_fp32 = (model(tokens)[0] - want).abs().max().item()
    partial = Path(f"{out}.tmp")
    model.save_pretrained(partial, dtype)
    written = (Llama.from_pretrained(partial)(tokens)[0] - want).abs().max().item()
    # the bound on fp32 is on arithmetic; 16-bit weights are off by their rounding as well
    if in_fp32 > 1e-4 * largest or written > (1e-4 if dtype == torch.float32 else 0.1) * largest:
        shutil.rmtree(partial)
        raise ValueError(f"merged and unmerged logits differ by {written:.3g} (largest logit {largest:.3g}, "
                         f"{in_fp32:.3g} before rounding to {dtype}): nothing was written")
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(base) / file).is_file():
            shutil.copyfile(Path(base) / file, partial / file)
    partial.rename(out)
    return written, largest, lost


if __name__ == "__main__":
    from configurator import configure
    from runtime import one_line_errors

    with one_line_errors():
        for name, value in configure(globals()).items():
            if not value:
                raise ValueError(f"{name} is not set; see --help")
        difference, largest, lost = merge_folders(base, adapter, out, getattr(torch, dtype))
        print(f"{out}: merged and unmerged logits agree to {difference:.3g} (largest logit {largest:.3g}); "
              f"{lost:.2%} of the change was lost to rounding to {dtype}")
