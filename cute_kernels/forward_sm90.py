"""Skip-aware attention forward for Hopper: layouts, launch, and the roles of the warps of a CTA.

As many CTAs as the GPU has multiprocessors, each working through jobs: a job is one q-tile of one head. A producer warp
lists the tiles of a job and loads them, one job ahead of the consumer warpgroups of 64 rows each.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.memory
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32, Uint8, const_expr
from cutlass.cute.nvgpu import cpasync

from lite_attention.cute_kernels import residual_call
from lite_attention.cute_kernels.config import KernelConfig, Masks, Residual, Scales, State
from lite_attention.cute_kernels.consumer_sm90 import Consumer
from lite_attention.cute_kernels.jobs_sm90 import Jobs, Load, Loads, Outputs, Shared
from lite_attention.cute_kernels.mainloop_sm90 import Pipes
from lite_attention.cute_kernels.producer_sm90 import Producer
from lite_attention.cute_kernels.products_sm90 import Products
from lite_attention.cute_kernels.residual_call import DENSE, FRESH, SLOT
from lite_attention.cute_kernels.storage_sm90 import Layouts, storage_of, views
from lite_attention.cute_kernels.tile_scheduler import DONE, RING, TileScheduler
from lite_attention.ops import control as c

_E4M3_ONE = 0x38


class SkipAttentionForward:
    """Builds one kernel; called through `cute.compile`."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.budget = config, config.budget
        self.products = Products(config)
        self.scheduler = TileScheduler(config)
        self.producer, self.consumer = Producer(config), Consumer(config)

    @cute.jit
    def __call__(
        self, q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, out: cute.Tensor, lse: cute.Tensor, state: State,
        masks: Masks, scales: Scales, residual: Residual, scale: Float32, processors: Int32, stream: cuda.CUstream,
    ):  # fmt: skip
        """Lay out and launch. The scale is in log2 units, unused in INT8; processors are the GPU's multiprocessors."""
        products, config = self.products, self.config
        qk_mma, pv_mma = products.tiled()
        q, k, v, out = products.as_tiled(q, k, v, out)
        layouts = Layouts(*products.layouts())
        one_k, one_v = (cute.select(layout, mode=[0, 1]) for layout in (layouts.k, layouts.v))
        one_v = products.loaded(one_v)
        load = cpasync.CopyBulkTensorTileG2SOp()
        loads = Loads(
            Load(*cpasync.make_tiled_tma_atom(load, q, layouts.q, (config.tile_m, config.head_dim))),
            Load(*cpasync.make_tiled_tma_atom(load, k, one_k, (config.tile_n, config.head_dim))),
            Load(*cpasync.make_tiled_tma_atom(load, v, one_v, products.v_tile)),
        )
        self.q_bytes, self.k_bytes = (cute.size_in_bytes(products.qk_dtype, x) for x in (layouts.q, one_k))
        self.v_bytes = products.v_tile[0] * products.v_tile[1] * products.v_dtype.width // 8
        self.storage = storage_of(config, layouts)
        jobs = cute.ceil_div(q.shape[0], config.tile_m) * q.shape[2] * q.shape[3]
        self.kernel(qk_mma, pv_mma, loads, out, lse, state, masks, scales, residual, scale, layouts).launch(
            grid=[cutlass.min(jobs, processors), 1, 1],
            block=[self.budget.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self, qk_mma: cute.TiledMma, pv_mma: cute.TiledMma, loads: Loads, gout: cute.Tensor, lse: cute.Tensor,
        state: State, masks: Masks, scales: Scales, residual: Residual, scale: Float32, layouts: Layouts,
    ):  # fmt: skip
        """Set up shared memory, read what the call is, and split into roles."""
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = cutlass.memory.SmemAllocator().allocate(self.storage)
        shared, jobs, tiles = views(config, storage, layouts)
        pipes = Pipes(
            self.pipe(1, self.q_bytes, storage.q_bars),
            self.pipe(self.budget.stages, self.k_bytes, storage.k_bars),
            self.pipe(self.budget.stages, self.v_bytes, storage.v_bars),
        )
        cute.arch.mbarrier_init_fence()
        if const_expr(self.budget.ones):
            self.fill_ones(shared.v, thread)
        if const_expr(self.config.skip):
            self.begin_call(state.control, residual, jobs, thread, loads.q.tensor, loads.k.tensor)
        cute.arch.sync_threads()
        loaded = Shared(shared.q, shared.k, self.products.loaded(shared.v, self.budget.stages), shared.sums)

        if warp < 4:
            cute.arch.setmaxregister_decrease(self.budget.producer_registers)
            if warp == 0:
                self.producer.produce(loads, loaded, pipes, state, masks, scales, residual, jobs, tiles, scale)
        else:
            cute.arch.setmaxregister_increase(self.budget.consumer_registers)
            self.consumer.consume(
                (qk_mma, pv_mma), shared, pipes, Outputs(gout, lse), state, masks, scales, residual, jobs, tiles, scale,
                (loads.q.tensor.shape[0], loads.k.tensor.shape[0]),
            )  # fmt: skip

    @cute.jit
    def begin_call(self, control, residual: Residual, jobs: Jobs, thread, gq: cute.Tensor, gk: cute.Tensor):
        """Read what the call is, once, and clear what jobs count up and vote."""
        if thread == 0:
            slot = control[c.SLOT]
            fresh = self.scheduler.is_fresh(control, self.scheduler.block(slot), gq.shape[3], gq.shape[0], gk.shape[0])
            jobs.call[SLOT] = slot
            jobs.call[FRESH] = Int32(fresh)
            jobs.call[DENSE] = control[c.FLAGS] & c.FLAG_DENSE
            if const_expr(self.config.residual):
                dense = (control[c.FLAGS] & c.FLAG_DENSE) != 0
                residual_call.begin(control, residual, jobs.call, self.scheduler.block(slot), slot, fresh, dense)
        words = cute.ceil_div(cute.ceil_div(gk.shape[0], self.config.tile_n), 32)
        for ring in cutlass.range_constexpr(RING):
            if thread == 0:
                jobs.words[ring, DONE] = Int32(0)
            if const_expr(self.config.votes):
                for tile in cutlass.range(thread, words * 32, self.budget.threads, unroll=1):
                    jobs.kept[ring, tile] = Uint8(0)

    @cute.jit
    def fill_ones(self, sv, thread):
        """Write the columns of V, rows in shared memory, that sum up the weights. TMA leaves them alone."""
        tile_n, ones = self.config.tile_n, cute.recast_tensor(sv, Uint8)
        for i in cutlass.range(thread, 8 * tile_n * self.budget.stages, self.budget.threads, unroll=1):
            ones[self.config.head_dim + i % 8, i // 8 % tile_n, i // 8 // tile_n] = Uint8(_E4M3_ONE)
        cute.arch.fence_proxy("async.shared", space="cta")

    def pipe(self, stages: int, size: int, barriers):
        """A ring that TMA fills and every consumer warp releases."""
        return pipeline.PipelineTmaAsync.create(
            num_stages=stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * self.budget.groups),
            tx_count=size,
            barrier_storage=barriers.data_ptr(),
            defer_sync=True,
        )
