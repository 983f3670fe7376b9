// Policy losses of one token, for C++ and CUDA: the loss, its derivative, and the figures that are reported.
//
// What each loss is, with its paper, stands in megatron_srft/ops/token_losses.py. To add one: a name in Loss
// (the numbers are the places in that file's table) and a case in token_loss.
#pragma once

#include "core/portable.h"

namespace srft {

enum Loss : int { kNll, kLogprob, kClipped, kProbability, kShaped, kEntropy, kPower, kBlended, kLossCount };

// Bits of PolicyTerm::rows: the kinds of rows that are summed, two to each population (A > 0, not A > 0), ...
constexpr int kRolloutRows = 0b0011, kDemonstrationRows = 0b1100;
constexpr int kPerLength = 0b01'0000;  // ... divided by the response's length,
constexpr int kCorrected = 0b10'0000;  // multiplied by the importance weight; and whether the term has
constexpr int kAdvantages = 1 << 6;    // advantages
constexpr int kWeights = 1 << 7;       // and weights; 1 otherwise

constexpr float kLogRatioLimit = 20.0f;
constexpr float kRounding = 1e-5f;  // an importance weight that differs by more has been corrected

constexpr int kMaxTerms = 8;

// Figures: of rollouts, of demonstrations, then of every term. Of each population the first kSums are means
// over tokens, the others largest values.
enum Figure : int {
  kNllFigure, kEntropyFigure, kRatioFigure, kK1, kK3, kClippedLow, kClippedHigh, kMismatch, kMismatchK3, kCorrectedShare,
  kSums, kMaxRatio = kSums, kMaxMismatch, kPopulationFigures,
};
enum TermFigure : int { kTermLoss, kWeight, kMaxWeight, kTermFigures };

constexpr int kMaxFigures = 2 * kPopulationFigures + kMaxTerms * kTermFigures;

struct PolicyTerm {
  int loss;  // a Loss
  int rows;
  float scale;
  float lower;  // 1 - clip_low
  float upper;  // 1 + clip_high
  float dual_clip;
  float gamma;
  float weight_share;  // 1 / tokens of its populations
};

struct ClippedRatioArguments {
  int64_t rows;
  const float* logprobs;  // [rows], as the next five
  const float* entropy;
  const uint8_t* is_demonstration;
  const float* response_lengths;
  const float* engine_logprobs;
  const float* old_logprobs;        // null: the current ones
  const float* importance_weights;  // null: 1
  const float* advantages;          // [terms, rows]; null: no term has any
  int64_t advantages_stride;
  const float* weights;  // [terms, rows]; null: no term has any
  int64_t weights_stride;
  int terms;
  PolicyTerm term[kMaxTerms];
  float population_share[2];  // 1 / tokens of rollouts, of demonstrations
  float* loss;
  float* gradients;         // [rows] by log-prob, then, if wanted, [rows] by entropy
  bool entropy_gradient;    // is it wanted?
  float* figures;           // [figure_count]
};

constexpr int kParameters = 5;  // of every term, as they come: scale, lower, upper, dual_clip, gamma

// Adds a term, and what follows from it. `tokens`: of rollouts, of demonstrations, in the whole.
inline void add_term(ClippedRatioArguments& call, int64_t loss, int64_t rows, const double* parameters,
                     const int64_t* tokens) {
  const auto share = [](int64_t count) { return static_cast<float>(1.0 / static_cast<double>(count > 1 ? count : 1)); };
  call.population_share[0] = share(tokens[0]);
  call.population_share[1] = share(tokens[1]);
  call.entropy_gradient |= loss == kEntropy;
  call.term[call.terms++] = {
      .loss = static_cast<int>(loss),
      .rows = static_cast<int>(rows),
      .scale = static_cast<float>(parameters[0]),
      .lower = static_cast<float>(parameters[1]),
      .upper = static_cast<float>(parameters[2]),
      .dual_clip = static_cast<float>(parameters[3]),
      .gamma = static_cast<float>(parameters[4]),
      .weight_share = share((rows & kRolloutRows ? tokens[0] : 0) + (rows & kDemonstrationRows ? tokens[1] : 0)),
  };
}

// A term's advantages or weights; null for 1.
SRFT_HD const float* advantages_of(const ClippedRatioArguments& call, int index) {
  const bool given = call.advantages != nullptr && call.term[index].rows & kAdvantages;
  return given ? call.advantages + index * call.advantages_stride : nullptr;
}

SRFT_HD const float* weights_of(const ClippedRatioArguments& call, int index) {
  const bool given = call.weights != nullptr && call.term[index].rows & kWeights;
  return given ? call.weights + index * call.weights_stride : nullptr;
}

SRFT_HD int figure_count(const ClippedRatioArguments& call) {
  return 2 * kPopulationFigures + call.terms * kTermFigures;
}

SRFT_HD bool is_maximum(int figure) {
  const int after = figure - 2 * kPopulationFigures;
  return after < 0 ? figure % kPopulationFigures >= kSums : after % kTermFigures == kMaxWeight;
}

// What a figure's sum is multiplied by.
SRFT_HD float figure_share(const ClippedRatioArguments& call, int figure) {
  const int after = figure - 2 * kPopulationFigures;
  if (is_maximum(figure)) return 1.0f;
  if (after < 0) return call.population_share[figure / kPopulationFigures];
  return after % kTermFigures == kWeight ? call.term[after / kTermFigures].weight_share : 1.0f;
}

SRFT_HD float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN wins

struct ClampedRatio {
  float log;
  float value;
  float slope;  // derivative of the value by the log before clamping
};

SRFT_HD ClampedRatio clamped_ratio(float log_ratio) {
  float log = log_ratio < -kLogRatioLimit ? -kLogRatioLimit : log_ratio;  // in this order NaN passes
  log = log > kLogRatioLimit ? kLogRatioLimit : log;
  const float value = exponential_in_range(log);
  return {log, value, log_ratio < -kLogRatioLimit || log_ratio > kLogRatioLimit ? 0.0f : value};
}

// Number is float, or a vector of floats (cpu/vectors.h), of which comparisons and ?: are lane by lane.

template <typename Number>
SRFT_HD Number exponential_of(const Number& x);

template <>
SRFT_HD float exponential_of(const float& x) {
  return exponential(x);
}

template <typename Number>
struct TokenLoss {
  Number value;
  Number by_logprob;
  Number by_entropy;
  Number clipped_low;  // 1 or 0
  Number clipped_high;
};

// `loss` is term.loss: a constant where the caller wants the switch resolved when compiling.
template <typename Number>
SRFT_HD TokenLoss<Number> token_loss(int loss, const PolicyTerm& term, const Number& logprob, const Number& entropy,
                                     const Number& ratio, const Number& ratio_slope, const Number& advantage) {
  const Number zero{}, one = zero + 1.0f;
  switch (loss) {
    case kNll:
      return {-logprob, -one, zero, zero, zero};
    case kLogprob:
      return {-advantage * logprob, -advantage, zero, zero, zero};
    case kClipped: {
      const auto pulls = advantage >= zero;
      const Number most = pulls ? zero + term.upper : zero + term.dual_clip;
      const Number least = pulls ? zero - INFINITY : zero + term.lower;
      const Number below_most = ratio > most ? most : ratio;
      const Number bounded = below_most < least ? least : below_most;
      const Number raised = bounded > ratio ? one : zero;
      const Number lowered = bounded < ratio ? one : zero;
      const Number slope = raised + lowered > zero ? zero : ratio_slope;
      return {-advantage * bounded, -advantage * slope, zero, raised, advantage > zero ? lowered : zero};
    }
    case kProbability: {
      const Number value = -advantage * exponential_of(logprob);
      return {value, value, zero, zero, zero};
    }
    case kShaped: {
      const Number probability = exponential_of(logprob);
      const Number share = one / (probability + term.gamma);
      const Number value = -advantage * probability * share;
      return {value, value * term.gamma * share, zero, zero, zero};
    }
    case kEntropy:
      return {-entropy, zero, -one, zero, zero};
    case kPower: {
      const Number value = -advantage * exponential_of<Number>(logprob * term.gamma);
      return {value, value * term.gamma, zero, zero, zero};
    }
    default: {  // kBlended
      const Number probability = exponential_of(logprob);
      const Number value = -advantage * (probability + logprob * term.gamma);
      return {value, -advantage * (probability + term.gamma), zero, zero, zero};
    }
  }
}

// The bit of a row in PolicyTerm::rows; 0 for a population of neither kind.
SRFT_HD int kind_of_row(int population, float advantage) {
  return population > 1 ? 0 : 1 << (2 * population + (advantage > 0.0f ? 0 : 1));
}

SRFT_HD bool in_population_of(int rows, int population) {
  return population == 0 ? (rows & kRolloutRows) != 0 : population == 1 && (rows & kDemonstrationRows) != 0;
}

}  // namespace srft
