"""Tokens for which another kernel attends, that of blocks of several: one thread block a token appends, and makes q ready for it."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.attention_parts import PAGE, to_cache
from moec.targets.kernels.cuda.emit import Buffer, Shared, local, store, strided, when
from moec.targets.kernels.cuda.step_several import Several


class Ready(Several):
    """The state of a thread block that has a whole token, of which each warp has some heads at a time."""

    ready: Buffer | None

    def _make_ready(self, shared: Shared) -> None:
        """Write q, normalised and turned, and the token's keys and values into the cache."""
        spec, a = self.spec, self.spec.attention
        self.squares = shared.take((2 * self.options.warps,), "float32")
        self.new_page = T.Bind(self.page_table[self.slot, self.first_position // PAGE])
        turn = self._angles(self.token)
        self._share_squares([self._pieces((self.q, self.k)[i], size) for i, size in self._whole_rows()])
        together, warps = 4 if a.d <= 128 else 2, self.options.warps
        kinds = (self.q, a.heads, spec.q_norm, self.q_weight), (self.k, a.kv_heads, spec.k_norm, self.k_weight)
        for which, (source, heads, norm, weight) in enumerate(kinds):
            common = self._weights(norm, weight, 0) if norm is not None and norm.size == a.d else None
            with strided(self.warp, heads, together * warps) as first:
                own = [T.Bind(T.min(first + i * warps, heads - 1)) for i in range(together)]
                rows = [self._pairs(source, head * a.d, (self.token,)) for head in own]  # all is asked for before the first use
                weights = [common if common is not None else self._weights(norm, weight, head) for head in own]
                for i, head in enumerate(own):
                    self._normalise(rows[i], norm, weights[i], self._squares_of(which))
                    self._turn(rows[i], turn)
                    with when(first + i * warps < heads):
                        for index, value in self._elements(rows[i]):
                            if which == 0:
                                store(self.ready, value, self.token, head * a.d + index)
                            else:
                                stored = to_cache(value, self.dtype)
                                store(self.k_pool, stored, self.new_page, head, self.first_position % PAGE, index)
        self._append_values(together)

    def _append_values(self, together: int) -> None:
        a, threads = self.spec.attention, self.options.threads
        size, values = a.kv_heads * a.dv, local(together, "float32")
        with strided(self.thread, size, together * threads) as first:
            for n in range(together):
                with when(first + n * threads < size):
                    store(values, self.v[self.token, first + n * threads], n)
            for n in range(together):
                i = T.Bind(first + n * threads)
                with when(i < size):
                    stored = to_cache(values[n], self.dtype)
                    store(self.v_pool, stored, self.new_page, i // a.dv, self.first_position % PAGE, i % a.dv)
