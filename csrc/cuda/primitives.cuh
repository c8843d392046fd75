// What a kernel needs assembly for, and the few collectives made of shuffles. All inline PTX is in this file; what the
// emulator of the tests does instead is in tests/cuda_emulator/emulated_primitives.h.
#pragma once
#include <cstring>
#include <type_traits>

#include "dialect.cuh"

namespace ava {

// Sums of rows of a tile, [16, 16] elements of 16 bits, of which each lane of a warp has a vector. Four lanes share two
// rows: of_rows is the sum of one, twice, and of the other, twice.
struct TileSums {
  float of_rows[4] = {};
};

}  // namespace ava

#ifdef __CUDACC__

namespace ava {

// 2^x by the special function unit, 2 ulp; exactly 0 for -inf and 1 for 0. Results under 2^-126 become 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x by the special function unit, 1 ulp; 0 for inf, and inf below 2^-126.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// log2(x) by the special function unit, off by 2^-22 at most between 1/2 and 2, else by 2 ulp.
__device__ __forceinline__ float log2_fast(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger one, and the smaller one; a nan wins, which it does not in fmaxf.
__device__ __forceinline__ float max_keep_nan(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

__device__ __forceinline__ float min_keep_nan(float x, float y) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

// 1 << shift, and 0 for a shift of 32 and more, as the instruction has it.
__device__ __forceinline__ uint32_t bit_at(unsigned shift) {
  uint32_t bit;
  asm("shl.b32 %0, 1, %1;" : "=r"(bit) : "r"(shift));
  return bit;
}

// The same value, of unknown origin to the compiler: what is made of it is computed again instead of kept in registers.
__device__ __forceinline__ unsigned computed_again(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The same, which the compiler keeps instead of computing it again: in a loop that costs a dozen instructions.
template <class Type>
__device__ __forceinline__ Type* computed_once(Type* global) {
  size_t address = __cvta_generic_to_global(global);
  asm volatile("" : "+l"(address));
  return static_cast<Type*>(__cvta_global_to_generic(address));
}
template <class Type>
__device__ __forceinline__ Type* shared_computed_once(Type* shared) {
  unsigned address = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(address));
  return static_cast<Type*>(__cvta_shared_to_generic(address));
}
__device__ __forceinline__ int computed_once(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// One transaction of 16 bytes: left to itself the compiler splits loads and stores of uint4 into words.
__device__ __forceinline__ uint4 load16(const void* global) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(global)));
  return value;
}
__device__ __forceinline__ void store16(void* global, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Stores an element of what is else loaded as vectors, which the compiler would take for other memory.
template <class Element>
__device__ __forceinline__ void store_in_vector(Element* place, Element value) {
  asm volatile("" ::: "memory");
  *place = value;
  asm volatile("" ::: "memory");
}

// 16 bytes from global to shared memory, past the registers and the first cache. They are there for the thread that
// asked once it has waited, and for others after a barrier behind that.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
// Closes a group: the copies asked for since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most so many of this thread's latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Clusters exist from sm_90 on; device_limits().largest_cluster keeps older devices away from them.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// A barrier for all threads of the cluster, behind which they see each other's writes.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}
// An mbarrier: eight bytes of shared memory that count arrivals of this block's threads and bytes that were stored into
// the block from anywhere in its cluster. A phase is over when every arrival and every expected byte is there; then the
// next one begins. Bytes may come before anybody has expected them: their count goes below zero meanwhile.
__device__ __forceinline__ void mbarrier_init(uint64_t* mbarrier, int n_arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(unsigned(__cvta_generic_to_shared(mbarrier))),
               "r"(n_arrivals)
               : "memory");
#else
  __trap();
#endif
}
// One arrival, which makes the phase expect so many bytes more. Releases what this thread did before.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t* mbarrier, int n_bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   unsigned(__cvta_generic_to_shared(mbarrier))),
               "r"(n_bytes)
               : "memory");
#else
  __trap();
#endif
}
// Until the phase of this parity is over: 0 for the first, 1 for the second, 0 for the third. It must be the current one
// or the last. Acquires within the block: what arrives lies in the block's own shared memory, of which there is no copy.
// Within the cluster, the compiler would throw away the multiprocessor's first cache behind every wait.
__device__ __forceinline__ void mbarrier_wait(uint64_t* mbarrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  unsigned is_over;
  do {
    asm volatile(
        "{\n.reg .pred is_over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 is_over, [%1], %2;\n"
        "selp.b32 %0, 1, 0, is_over;\n}"
        : "=r"(is_over)
        : "r"(unsigned(__cvta_generic_to_shared(mbarrier))), "r"(parity)
        : "memory");
  } while (!is_over);
#else
  __trap();
#endif
}
// Stores 16 bytes into the shared memory of block `rank` of the cluster, to the place where this block has `shared`, and
// then counts them at its mbarrier. That block has to have set up its mbarrier (a cluster_sync behind), and must not end
// before it has waited for them. No fence: these bytes wait for no other store of this thread, and none waits for them.
__device__ __forceinline__ void store_async16(void* shared, uint4 value, uint64_t* mbarrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 place, counter;\n"
      "mapa.shared::cluster.u32 place, %0, %6;\n"
      "mapa.shared::cluster.u32 counter, %5, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [place], {%1, %2, %3, %4}, [counter];\n}" ::"r"(
          unsigned(__cvta_generic_to_shared(shared))),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(unsigned(__cvta_generic_to_shared(mbarrier))),
      "r"(rank)
      : "memory");
#else
  __trap();
#endif
}

// A vector more of every lane, by the tensor cores, which take the product with ones: all lanes of the warp together.
// Elements are exact; what is added in float32 may be cut, where other units round.
template <class Element>
__device__ __forceinline__ void add_tile(uint4 vector, TileSums& sums) {
  float* const d = sums.of_rows;
  if constexpr (std::is_same<Element, __half>::value)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %8}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(vector.x), "r"(vector.y), "r"(vector.z), "r"(vector.w), "r"(0x3c003c00));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %8}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(vector.x), "r"(vector.y), "r"(vector.z), "r"(vector.w), "r"(0x3f803f80));
}

}  // namespace ava

#else
#include "emulated_primitives.h"
#endif

namespace ava {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Every lane gets the same bits: lane i adds its value to that of lane i ^ offset, and addition commutes.
template <class Type>
__device__ __forceinline__ Type warp_sum(Type value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kWholeWarp, value, offset);
  return value;
}
// The same of three values in fewer rounds: half of the lanes go on with one of two values, the others with the other.
__device__ __forceinline__ void warp_sums(float& a, float& b, float& c) {
  const bool has_b = threadIdx.x & 16, has_c = threadIdx.x & 8;
  float sum = (has_b ? b : a) + __shfl_xor_sync(kWholeWarp, has_b ? a : b, 16);
  c += __shfl_xor_sync(kWholeWarp, c, 16);
  sum = (has_c ? c : sum) + __shfl_xor_sync(kWholeWarp, has_c ? sum : c, 8);
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, offset);
  a = __shfl_sync(kWholeWarp, sum, 0);
  b = __shfl_sync(kWholeWarp, sum, 16);
  c = __shfl_sync(kWholeWarp, sum, 8);
}
// A lane's quarter of its rows' sums: warp_sum adds up what the tensor cores were given.
__device__ __forceinline__ float lane_sum(const TileSums& sums) { return (sums.of_rows[0] + sums.of_rows[2]) / 4; }
// One instruction for each, not five rounds of shuffles.
__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kWholeWarp, value); }
__device__ __forceinline__ int warp_min(int value) { return __reduce_min_sync(kWholeWarp, value); }
// Of floats by integers in the same order. There must be no nan.
__device__ __forceinline__ int ordered(int bits) { return bits < 0 ? bits ^ 0x7fffffff : bits; }
__device__ __forceinline__ float warp_max(float value) {
  return __int_as_float(ordered(__reduce_max_sync(kWholeWarp, ordered(__float_as_int(value)))));
}
__device__ __forceinline__ double warp_max(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmax(value, __shfl_xor_sync(kWholeWarp, value, offset));
  return value;
}

// A row's elements: float, double, __half, __nv_bfloat16. Double is computed with as such, the others as float.
template <class Element>
using RealOf = std::conditional_t<std::is_same<Element, double>::value, double, float>;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Element>
__device__ __forceinline__ Element from_float(float value) {  // to nearest, ties to even
  if constexpr (std::is_same<Element, __half>::value)
    return __float2half_rn(value);
  else if constexpr (std::is_same<Element, __nv_bfloat16>::value)
    return __float2bfloat16_rn(value);
  else
    return value;
}

template <class Element>
__device__ __forceinline__ RealOf<Element> to_real(Element value) {
  if constexpr (std::is_same<Element, double>::value)
    return value;
  else
    return to_float(value);
}
template <class Element>
__device__ __forceinline__ Element from_real(RealOf<Element> value) {
  if constexpr (std::is_same<Element, double>::value)
    return value;
  else
    return from_float<Element>(value);
}

// Two elements of 16 bits, for instructions that take both at once.
template <class Element>
using ElementPair = std::conditional_t<std::is_same<Element, __half>::value, __half2, __nv_bfloat162>;

// Rows travel as uint4: in registers, arrays of 16-bit elements cost a register each and are stored piecewise.
template <class Element>
constexpr int kVectorSize = 16 / int(sizeof(Element));

template <class Element>
__device__ __forceinline__ void unpack(uint4 bits, float* values) {  // values: [kVectorSize]
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same<Element, float>::value) {
      values[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same<Element, __nv_bfloat16>::value) {  // one integer instruction each
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      __half2 pair;
      memcpy(static_cast<void*>(&pair), &words[i], 4);
      const float2 both = __half22float2(pair);
      values[2 * i] = both.x;
      values[2 * i + 1] = both.y;
    }
  }
}

template <class Element>
__device__ __forceinline__ uint4 pack(const float* values) {  // values: [kVectorSize]
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same<Element, float>::value) {
      words[i] = __float_as_uint(values[i]);
    } else if constexpr (std::is_same<Element, __nv_bfloat16>::value) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      memcpy(&words[i], &pair, 4);
    } else {
      const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
      memcpy(&words[i], &pair, 4);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// The largest and the smallest element; a nan loses (it reaches the result through the sums).
template <class Element>
__device__ __forceinline__ void vector_range(uint4 bits, float& highest, float& lowest) {
  if constexpr (sizeof(Element) == 2) {  // two elements per instruction
    ElementPair<Element> pairs[4];
    memcpy(static_cast<void*>(pairs), &bits, 16);
    const auto high = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
    const auto low = __hmin2(__hmin2(pairs[0], pairs[1]), __hmin2(pairs[2], pairs[3]));
    highest = fmaxf(to_float(high.x), to_float(high.y));
    lowest = fminf(to_float(low.x), to_float(low.y));
  } else {
    float values[kVectorSize<Element>];
    unpack<Element>(bits, values);
    highest = fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3]));
    lowest = fminf(fminf(values[0], values[1]), fminf(values[2], values[3]));
  }
}

}  // namespace ava
