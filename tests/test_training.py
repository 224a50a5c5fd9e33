"""ModelNew in networks that train: on real data, and under PyTorch's own distributed wrappers with two processes."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist
from fuzz import one_thread
from torch import nn

from model_new import Model, ModelNew, select_tile


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def network(kind):
    """Two layers of `kind` and a linear one, from one seed. On a Hopper GPU the second layer runs a fused kernel."""
    torch.manual_seed(0)
    return nn.Sequential(kind(64, 512, 2.0), nn.LayerNorm(512), kind(512, 1024, -1.0), nn.Linear(1024, 10))


def assert_near(actual, expected, what, tolerance=1e-5):
    """Asserts that two tensors differ by at most `tolerance`, relative, in the Frobenius norm."""
    assert actual.shape == expected.shape, what
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def test_a_fused_kernel_serves_the_second_layer():
    """The whole batch, and the half of it that one of two processes has."""
    assert all(select_tile("float32", m, 1024, 512) for m in (256, 128))


# one process


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's 1797 handwritten digits, shuffled: images [1797, 64] in [0, 1], and classes."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]


def train(net, digits, device, steps=80, batch=256, held_out=397):
    """The losses of all steps and the accuracy on images not trained on."""
    net, (images, classes) = net.to(device), (t.to(device) for t in digits)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        chosen = torch.randint(len(images) - held_out, (batch,), generator=generator).to(device)
        loss = nn.functional.cross_entropy(net(images[chosen]), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        right = net(images[-held_out:]).argmax(1) == classes[-held_out:]
    return torch.stack(losses).double().cpu(), right.double().mean().item()


def test_learns_digits_along_models_loss_curve(digits, device):
    """The curves differ by no more than float32 noise: ten times what one ulp in the first layer's weights does to
    Model's up to that step, and 1e-6, as an ulp may happen to do nothing (the losses go from 2.3 to about 0.1).
    """
    expected, accuracy = train(network(Model), digits, device)
    moved = network(Model)
    with torch.no_grad():
        weight = moved[0].gemm.weight
        weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    noise = (train(moved, digits, device)[0] - expected).abs().cummax(0).values
    losses, new_accuracy = train(network(ModelNew), digits, device)
    excess = ((losses - expected).abs() / (10 * noise + 1e-6)).max().item()
    assert excess <= 1, f"the curves differ by {excess:.1f} times what they may"
    assert accuracy > 0.9 and new_accuracy > 0.9


# two processes

gloo = dist.is_available() and dist.is_gloo_available()
nccl = dist.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= 2
needs_gloo = pytest.mark.skipif(not gloo, reason="needs gloo")
needs_nccl = pytest.mark.skipif(not nccl, reason="needs NCCL and two CUDA devices")
two_processes = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_gloo), pytest.param("cuda", marks=needs_nccl)]
)


def _process(rank, check, device, rendezvous, arguments):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    check(rank, torch.device(device, rank if device == "cuda" else None), *arguments)
    dist.barrier()
    dist.destroy_process_group()
    # The check has passed. Without Python's own end, in which PyTorch's threads now and then abort the process
    # ("terminate called without an active exception"), once in some ten runs.
    os._exit(0)


def in_two_processes(check, device, folder, *arguments):
    """Runs check(rank, device, *arguments), which asserts, in two processes that know each other."""
    torch.multiprocessing.spawn(_process, (check, device, folder / "rendezvous", arguments), nprocs=2)


def batch_for(rank, device):
    """(x, target) whole, and the half of one process."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.rand(256, 64, generator=generator).to(device), torch.rand(256, 10, generator=generator).to(device)
    return whole, tuple(t.chunk(2)[rank] for t in whole)


def loss_of(net, batch):
    return (net(batch[0]) - batch[1]).square().mean()


def check_ddp(rank, device):
    whole, half = batch_for(rank, device)
    reference, net = network(Model).to(device), network(ModelNew).to(device)
    ddp = nn.parallel.DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    loss_of(reference, whole).backward()
    loss_of(ddp, half).backward()
    for (name, parameter), expected in zip(net.named_parameters(), reference.parameters()):
        assert_near(parameter.grad, expected.grad, name)


@two_processes
def test_ddp_gradients_are_those_of_the_whole_batch(device, tmp_path):
    in_two_processes(check_ddp, device, tmp_path)


def check_fsdp(rank, device):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    whole, half = batch_for(rank, device)
    reference, net = network(Model).to(device), network(ModelNew).to(device)
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    for layer in (net[0], net[2].gemm, net):
        fully_shard(layer, mesh=mesh)
    assert net[0].gemm.weight.to_local().shape == (256, 64)
    for model, batch in ((reference, whole), (net, half)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loss_of(model, batch).backward()
        optimizer.step()
    for (name, parameter), expected in zip(net.named_parameters(), reference.parameters()):
        parameter, start = parameter.full_tensor().detach(), before[name]
        assert_near(parameter, expected.detach(), name, tolerance=1e-6)
        assert_near(parameter - start, expected.detach() - start, f"{name}, the step", tolerance=1e-3)


@two_processes
def test_fsdp2_step_is_that_of_one_process(device, tmp_path):
    in_two_processes(check_fsdp, device, tmp_path)


def check_column_parallel(rank, device):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
    torch.manual_seed(0)
    reference, layer = Model(512, 384, 2.0).to(device), ModelNew(512, 384, 2.0)
    layer.load_state_dict(reference.state_dict())
    parallelize_module(layer.to(device), mesh, {"gemm": ColwiseParallel()})
    x, grad = torch.rand(8, 32, 512, device=device), torch.randn(8, 32, 384, device=device)
    whole_x, x = x.clone().requires_grad_(), x.requires_grad_()
    out, expected = layer(x), reference(whole_x)
    assert_near(out.detach(), expected.detach().chunk(2, -1)[rank], "out")
    out.backward(grad.chunk(2, -1)[rank])
    expected.backward(grad)
    assert_near(x.grad, whole_x.grad, "gradient of x")
    for (name, parameter), whole in zip(layer.named_parameters(), reference.parameters()):
        assert parameter.grad.placements == (Shard(0),)
        assert_near(parameter.grad.full_tensor(), whole.grad, f"gradient of {name}")


@two_processes
def test_column_parallel_is_the_unsharded_layer(device, tmp_path):
    in_two_processes(check_column_parallel, device, tmp_path)
