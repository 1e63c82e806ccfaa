// Noise that depends only on (seed, position, token): Philox4x32-10, counted, never stepped.
// docs/sampling.md specifies every bit of it.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace mirror {

using Words = std::array<std::uint32_t, 4>;

// Token words of the two draws that belong to no token.
constexpr std::uint32_t tail_word = 0xFFFFFFFFu;
constexpr std::uint32_t pick_word = 0xFFFFFFFEu;

// Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
inline Words philox(Words counter, std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{counter[0]} * 0xD2511F53u;
    const std::uint64_t product1 = std::uint64_t{counter[2]} * 0xCD9E8D57u;
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A uniform in (0, 1), (k + 0.5) / 2^52 for an integer k.
inline double uniform(std::uint64_t seed, std::uint64_t position, std::uint32_t token) {
  const Words words =
      philox({token, static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32), 0},
             static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
  const std::uint64_t bits = (std::uint64_t{words[1]} << 32) | words[0];
  return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
}

inline double gumbel(double uniform_value) { return -std::log(-std::log(uniform_value)); }

}  // namespace mirror
