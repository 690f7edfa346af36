// Codes and scales of a step, from global memory to the lanes that multiply them.
#pragma once
#include "kv_cache_fragments.cuh"
#include "kv_cache_sizes.cuh"

struct Keys {
  u32 words[2][2][KEY_WORDS];  // [tile of 16 keys][row lane / 4, row lane / 4 + 8]
  u32 scales[2][2];
};

struct Values {
  u32 words[2][4][VALUE_WORDS];  // [tile of 16 tokens][the lane's four]
  u32 scales[2][4];
};

// What a lane loads, and where: of keys, a quarter of the channels of rows lane / 4 and lane / 4 + 8; of values, an
// eighth of the channels of tokens lane % 4 + {0, 4, 8, 12}. Row r of 8 keys is token r / 2 + 4 (r % 2) of them, so
// that the transposed weights meet those tokens.
class Loader {
 public:
  __device__ Loader(const KvDecodeParams& p, u32 kv_head, u32 lane) {
    u32 row = lane / 4, column = lane % 4, row_token = row / 2 + row % 2 * 4;
    u64 first = static_cast<u64>(kv_head) * p.padded_capacity;
    scale_bytes_ = D / p.group;
    key_codes_ = p.key_codes + (first + row_token) * CODE_BYTES + column * (KEY_WORDS * 4);
    value_codes_ = p.value_codes + (first + column) * CODE_BYTES + row * (VALUE_WORDS * 4);
    u32 key_scale = column * (D / 4) / p.group;  // of the lane's first channel
    if constexpr (D == 128) {
      // Two bytes, of which a lane's two halves of 16 channels take one each, or both the same.
      bool two = p.group == 16;
      u32 byte = two ? 0 : key_scale % 2;
      low_ = byte ? 0x3232 : 0x1010;
      high_ = two || byte ? 0x3232 : 0x1010;
      key_scale -= byte;
    } else {
      low_ = high_ = 0x1010;
    }
    key_scales_ = p.key_scales + (first + row_token) * scale_bytes_ + key_scale;
    value_scales_ = p.value_scales + (first + column) * scale_bytes_ + row * (D / 8) / p.group;
  }

  __device__ __forceinline__ void load(Keys& keys, u32 start) const {
    const u8* codes = key_codes_ + static_cast<u64>(start) * CODE_BYTES;
    load_once<KEY_WORDS, 0>(keys.words[0][0], codes);
    load_once<KEY_WORDS, 8 * CODE_BYTES>(keys.words[0][1], codes);
    load_once<KEY_WORDS, 16 * CODE_BYTES>(keys.words[1][0], codes);
    load_once<KEY_WORDS, 24 * CODE_BYTES>(keys.words[1][1], codes);
    const u8* scales = key_scales_ + static_cast<u64>(start) * scale_bytes_;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u8* address = scales + 8 * i * scale_bytes_;
      keys.scales[i / 2][i % 2] = D == 128 ? load_global_2(address) : load_global_1(address);
    }
  }

  __device__ __forceinline__ void load(Values& values, u32 start) const {
    const u8* codes = value_codes_ + static_cast<u64>(start) * CODE_BYTES;
    load_tokens<0>(values.words[0], codes);
    load_tokens<16>(values.words[1], codes);
    const u8* scales = value_scales_ + static_cast<u64>(start) * scale_bytes_;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) values.scales[i / 4][i % 4] = load_global_1(scales + 4 * i * scale_bytes_);
  }

  // The scales of a lane's first and second half of its channels of a key, each twice.
  __device__ __forceinline__ void unpack_key_scales(u32 bytes, u32& low, u32& high) const {
    u32 both = unpack_scales(bytes);
    low = permute_bytes(both, 0, low_);
    high = permute_bytes(both, 0, high_);
  }

 private:
  template <u32 FIRST>
  __device__ __forceinline__ void load_tokens(u32 (&words)[4][VALUE_WORDS], const u8* codes) const {
    load_once<VALUE_WORDS, FIRST * CODE_BYTES>(words[0], codes);
    load_once<VALUE_WORDS, (FIRST + 4) * CODE_BYTES>(words[1], codes);
    load_once<VALUE_WORDS, (FIRST + 8) * CODE_BYTES>(words[2], codes);
    load_once<VALUE_WORDS, (FIRST + 12) * CODE_BYTES>(words[3], codes);
  }

  const u8 *key_codes_, *value_codes_, *key_scales_, *value_scales_;
  u32 scale_bytes_, low_, high_;
};
