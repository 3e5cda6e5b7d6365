// Choose topk experts for each token: scores, groups of experts, the largest, their weights.
//
// Defined by the build, see moe_route.py: X (type of the logits), BIAS_T and HAS_BIAS, OUT (of the
// weights), SCORING (0 softmax, 1 sigmoid, 2 softmax over the chosen logits), EXPERTS, GROUPS,
// TOPK_GROUPS, TOP2 (a group counts as the sum of its two best, else as its best), TOPK,
// RENORMALIZE, THREADS, GROUP_LANES a group, LANES a token, PER_LANE experts a lane.
//
// Among equals the expert of the lowest number is chosen. NaN is the largest score, as in topk.
#include "reduce.h"
#include "transcendental.h"

constexpr int GROUP_SIZE = EXPERTS / GROUPS;
constexpr u32 NOBODY = ~0u;
constexpr float LOG2_E = 1.44269504f;

// The experts of a lane are neighbours of one group; what is beyond the group is no expert.
SIMT_DEVICE int lane() { return thread_index() % LANES; }
SIMT_DEVICE int group() { return lane() / GROUP_LANES; }
SIMT_DEVICE int in_group(int i) { return lane() % GROUP_LANES * PER_LANE + i; }
SIMT_DEVICE bool is_expert(int i) { return group() < GROUPS && in_group(i) < GROUP_SIZE; }
SIMT_DEVICE u32 expert(int i) { return (u32)(group() * GROUP_SIZE + in_group(i)); }

// Floats as integers of the same order; 0 is below every float and marks who is out of the race.
SIMT_DEVICE u32 rank_of(float x) {
  const u32 bits = bits_of(x);
  if (x != x) return ~0u;
  return bits >> 31 ? ~bits : bits | 0x80000000;
}
SIMT_DEVICE float of_rank(u32 rank) { return float_of(rank >> 31 ? rank & 0x7fffffff : ~rank); }

struct Best {
  u32 rank, index;
};

template <int WIDTH> SIMT_DEVICE Best best_of(u32 rank, u32 index) {
  const u32 largest = wave_reduce<WIDTH, Largest>(rank);
  return {largest, wave_reduce<WIDTH, Lowest>(rank == largest ? index : NOBODY)};
}

// A lane's first best.
SIMT_DEVICE Best best_here(const u32 (&ranks)[PER_LANE]) {
  Best best = {ranks[0], expert(0)};
  UNROLL for (int i = 1; i < PER_LANE; i++)
    if (ranks[i] > best.rank) best = {ranks[i], expert(i)};
  return best;
}

template <int WIDTH> SIMT_DEVICE Best take_best(u32 (&ranks)[PER_LANE]) {
  const Best here = best_here(ranks), best = best_of<WIDTH>(here.rank, here.index);
  UNROLL for (int i = 0; i < PER_LANE; i++)
    if (expert(i) == best.index) ranks[i] = 0;
  return best;
}

SIMT_DEVICE void softmax(float (&x)[PER_LANE]) {
  u32 largest = 0;
  UNROLL for (int i = 0; i < PER_LANE; i++)
    if (is_expert(i)) largest = Largest::of(largest, rank_of(x[i]));
  const float top = of_rank(wave_reduce<LANES, Largest>(largest));
  float sum = 0.0f;
  UNROLL for (int i = 0; i < PER_LANE; i++) {
    x[i] = power_of_two((x[i] - top) * LOG2_E);
    if (is_expert(i)) sum += x[i];
  }
  sum = float_of(wave_reduce<LANES, Sum>(bits_of(sum)));
  UNROLL for (int i = 0; i < PER_LANE; i++) x[i] /= sum;
}

// Puts the experts of all groups but the TOPK_GROUPS best ones out of the race.
SIMT_DEVICE void keep_best_groups(u32 (&ranks)[PER_LANE]) {
  u32 left[PER_LANE];
  UNROLL for (int i = 0; i < PER_LANE; i++) left[i] = ranks[i];
  u32 score = take_best<GROUP_LANES>(left).rank;
  if constexpr (TOP2) {
    const Best second = take_best<GROUP_LANES>(left);
    score = rank_of(of_rank(score) + of_rank(second.rank));
  }
  if (group() >= GROUPS) score = 0;
  bool kept = false;
  for (int i = 0; i < TOPK_GROUPS; i++) {
    const Best best = best_of<LANES>(kept ? 0 : score, (u32)group());
    kept = kept || best.index == (u32)group();
  }
  UNROLL for (int i = 0; i < PER_LANE; i++)
    if (!kept) ranks[i] = 0;
}

// A token's choice: lane i of LANES knows the weights of the experts that it holds.
struct Choice {
  float weights[TOPK];
  u32 experts[TOPK];
  float sum;
};

SIMT_DEVICE Choice choose(const float (&scores)[PER_LANE], u32 (&ranks)[PER_LANE]) {
  Choice choice;
  float top = 0.0f, sum = 0.0f;
  UNROLL for (int k = 0; k < TOPK; k++) {
    const Best best = take_best<LANES>(ranks);
    choice.experts[k] = best.index;
    choice.weights[k] = 0.0f;
    if constexpr (SCORING == 2) {
      if (k == 0) top = of_rank(best.rank);
      choice.weights[k] = power_of_two((of_rank(best.rank) - top) * LOG2_E);
      sum += choice.weights[k];
    } else {
      UNROLL for (int i = 0; i < PER_LANE; i++)
        if (expert(i) == best.index && is_expert(i)) choice.weights[k] = scores[i];
      sum += choice.weights[k];
    }
  }
  choice.sum = SCORING == 2 || !RENORMALIZE ? sum
                                            : float_of(wave_reduce<LANES, Sum>(bits_of(sum)));
  return choice;
}

SIMT_DEVICE bool holds(u32 index) {
  return index / GROUP_SIZE == (u32)group() &&
         index % GROUP_SIZE / PER_LANE == (u32)(lane() % GROUP_LANES);
}

SIMT_KERNEL(THREADS)
moe_route_kernel(const X* logits, const BIAS_T* bias, OUT* weights, i64* experts, i32 num_tokens,
                 i64 logits_token, float eps, float scale) {
  const i32 token = block_x() * (THREADS / LANES) + thread_index() / LANES;
  const bool live = token < num_tokens;
  begin(logits + token * logits_token, bias);
  float scores[PER_LANE];
  UNROLL for (int i = 0; i < PER_LANE; i++) {
    float x[1] = {0.0f};
    if (live && is_expert(i)) load(logits + (token * logits_token + expert(i)), x);
    scores[i] = x[0];
  }
  if constexpr (SCORING == 0) softmax(scores);
  if constexpr (SCORING == 1)
    UNROLL for (int i = 0; i < PER_LANE; i++) scores[i] = sigmoid(scores[i]);
  u32 ranks[PER_LANE];
  UNROLL for (int i = 0; i < PER_LANE; i++) {
    float shift[1] = {0.0f};
    if constexpr (HAS_BIAS)
      if (is_expert(i)) load(bias + expert(i), shift);
    ranks[i] = is_expert(i) ? rank_of(scores[i] + shift[0]) : 0;
  }
  if constexpr (GROUPS > 1) keep_best_groups(ranks);
  const Choice choice = choose(scores, ranks);
  UNROLL for (int k = 0; k < TOPK; k++) {
    if (!live || !holds(choice.experts[k])) continue;
    const i64 at = (i64)token * TOPK + k;
    float weight[1] = {choice.weights[k]};
    if constexpr (SCORING == 2) weight[0] /= choice.sum;
    if constexpr (RENORMALIZE && SCORING != 2) weight[0] /= choice.sum + eps;
    weight[0] *= scale;
    store(weights + at, weight);
    experts[at] = choice.experts[k];
  }
}
SIMT_ENTRY(moe_route_kernel)
