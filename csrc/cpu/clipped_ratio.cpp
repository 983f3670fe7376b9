// Policy losses on a CPU. A chunk of rows is worked on in loops over short arrays that stay in the first cache,
// without branches on a row's content, so that the compiler vectorises every one of them.
#include "cpu/clipped_ratio.h"

namespace srft::cpu {
namespace {

constexpr int kChunkRows = 512;
constexpr int kLanes = 32;  // independent sums for vector registers; for fewer the compiler unrolls the loop over them
constexpr int kNobody = 2;  // population of the rows that fill a chunk up to whole lanes

struct Chunk {
  int64_t start;
  int rows;
  int padded;  // to whole lanes
  int population[kChunkRows];
  float logprob[kChunkRows], entropy[kChunkRows];
  float log_ratio[kChunkRows], ratio[kChunkRows], slope[kChunkRows];
  float engine_gap[kChunkRows], engine_ratio[kChunkRows];
  float clipped_low[kChunkRows], clipped_high[kChunkRows];
  float by_logprob[kChunkRows], by_entropy[kChunkRows];
};

struct RowsOfTerm {
  int chosen[kChunkRows];
  float advantage[kChunkRows], weight[kChunkRows], factor[kChunkRows], value[kChunkRows];
};

SRFT_HD void copy(const Chunk& chunk, const float* source, float otherwise, float* target) {
  if (source == nullptr) {
    for (int i = 0; i < chunk.padded; ++i) target[i] = otherwise;
    return;
  }
  for (int i = 0; i < chunk.rows; ++i) target[i] = source[chunk.start + i];
  for (int i = chunk.rows; i < chunk.padded; ++i) target[i] = otherwise;
}

SRFT_HD void load(const ClippedRatioArguments& call, Chunk& chunk) {
  for (int i = 0; i < chunk.rows; ++i) chunk.population[i] = call.is_demonstration[chunk.start + i] != 0;
  for (int i = chunk.rows; i < chunk.padded; ++i) chunk.population[i] = kNobody;
  float old[kChunkRows], engine[kChunkRows];
  copy(chunk, call.logprobs, 0.0f, chunk.logprob);
  copy(chunk, call.entropy, 0.0f, chunk.entropy);
  copy(chunk, call.old_logprobs != nullptr ? call.old_logprobs : call.logprobs, 0.0f, old);
  copy(chunk, call.engine_logprobs, 0.0f, engine);
  for (int i = 0; i < chunk.padded; ++i) {
    const ClampedRatio policy = clamped_ratio(chunk.logprob[i] - old[i]);
    const ClampedRatio behaviour = clamped_ratio(chunk.population[i] == 0 ? old[i] - engine[i] : 0.0f);
    chunk.log_ratio[i] = policy.log;
    chunk.ratio[i] = policy.value;
    chunk.slope[i] = policy.slope;
    chunk.engine_gap[i] = behaviour.log;
    chunk.engine_ratio[i] = behaviour.value;
    chunk.clipped_low[i] = chunk.clipped_high[i] = chunk.by_logprob[i] = chunk.by_entropy[i] = 0.0f;
  }
}

// Sum of `value` over the rows for which `counts` holds.
template <typename Counts, typename Value>
SRFT_HD double sum_of(const Chunk& chunk, const Counts& counts, const Value& value) {
  float lanes[kLanes] = {};
  for (int start = 0; start < chunk.padded; start += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float term = value(start + lane);
      lanes[lane] += counts(start + lane) ? term : 0.0f;
    }
  }
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Largest of them, at least 0; NaN if there is one, which the `sum` of them tells.
template <typename Counts, typename Value>
SRFT_HD double largest_of(const Chunk& chunk, const Counts& counts, const Value& value, double sum) {
  float lanes[kLanes] = {};
  for (int start = 0; start < chunk.padded; start += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float term = counts(start + lane) ? value(start + lane) : 0.0f;
      lanes[lane] = lanes[lane] > term ? lanes[lane] : term;
    }
  }
  float largest = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
  return std::isnan(sum) ? sum : largest;
}

#define SRFT_EACH [&](int i) __attribute__((always_inline))

// A row's kind is found in a loop of its own: with its test of the advantage's sign beside the clip's, compilers make
// branches of both.
template <int kLoss>
SRFT_HD void add_term(const PolicyTerm& term, Chunk& chunk, RowsOfTerm& rows) {
  for (int i = 0; i < chunk.padded; ++i) {
    const TokenLoss loss = token_loss(kLoss, term, chunk.logprob[i], chunk.entropy[i], chunk.ratio[i],
                                      chunk.slope[i], rows.advantage[i]);
    const float factor = rows.factor[i];
    const bool chosen = rows.chosen[i] != 0;
    rows.value[i] = chosen ? factor * loss.value : 0.0f;
    chunk.by_logprob[i] += chosen ? factor * loss.by_logprob : 0.0f;
    chunk.by_entropy[i] += chosen ? factor * loss.by_entropy : 0.0f;
    chunk.clipped_low[i] += chosen ? loss.clipped_low : 0.0f;
    chunk.clipped_high[i] += chosen ? loss.clipped_high : 0.0f;
  }
}

// add_term with the loss as a constant.
template <int kLoss = 0>
SRFT_HD void add_term_of(int loss, const PolicyTerm& term, Chunk& chunk, RowsOfTerm& rows) {
  if (loss == kLoss) {
    add_term<kLoss>(term, chunk, rows);
  } else if constexpr (kLoss + 1 < kLossCount) {
    add_term_of<kLoss + 1>(loss, term, chunk, rows);
  }
}

SRFT_HD void run_term(const ClippedRatioArguments& call, int index, Chunk& chunk, double* figures) {
  const PolicyTerm& term = call.term[index];
  RowsOfTerm rows;
  float other[kChunkRows];
  copy(chunk, advantages_of(call, index), 1.0f, rows.advantage);
  copy(chunk, weights_of(call, index), 1.0f, rows.weight);
  for (int i = 0; i < chunk.padded; ++i) {
    rows.chosen[i] = term.rows & kind_of_row(chunk.population[i], rows.advantage[i]);
    rows.factor[i] = term.scale * rows.weight[i];
  }
  if (term.rows & kPerLength) {
    copy(chunk, call.response_lengths, 1.0f, other);
    for (int i = 0; i < chunk.padded; ++i) rows.factor[i] /= other[i];
  }
  if (term.rows & kCorrected && call.importance_weights != nullptr) {
    copy(chunk, call.importance_weights, 1.0f, other);
    for (int i = 0; i < chunk.padded; ++i) rows.factor[i] *= other[i];
  }
  add_term_of(term.loss, term, chunk, rows);
  const auto all = SRFT_EACH { return chunk.population[i] != kNobody; };
  const auto counts = SRFT_EACH { return in_population_of(term.rows, chunk.population[i]); };
  const auto weight = SRFT_EACH { return rows.weight[i]; };
  figures[kTermLoss] = sum_of(chunk, all, SRFT_EACH { return rows.value[i]; });
  figures[kWeight] = sum_of(chunk, counts, weight);
  figures[kMaxWeight] = largest_of(chunk, counts, weight, figures[kWeight]);
}

SRFT_HD void run_population(const ClippedRatioArguments& call, int population, const Chunk& chunk, double* figures) {
  const auto counts = SRFT_EACH { return chunk.population[i] == population; };
  const auto sum = [&](const auto& value) __attribute__((always_inline)) { return sum_of(chunk, counts, value); };
  const auto ratio = SRFT_EACH { return chunk.ratio[i]; };
  const auto gap = SRFT_EACH { return std::fabs(chunk.engine_gap[i]); };
  figures[kNllFigure] = sum(SRFT_EACH { return -chunk.logprob[i]; });
  figures[kEntropyFigure] = sum(SRFT_EACH { return chunk.entropy[i]; });
  figures[kRatioFigure] = sum(ratio);
  figures[kK1] = sum(SRFT_EACH { return -chunk.log_ratio[i]; });
  figures[kK3] = sum(SRFT_EACH { return chunk.ratio[i] - 1.0f - chunk.log_ratio[i]; });
  figures[kClippedLow] = sum(SRFT_EACH { return chunk.clipped_low[i]; });
  figures[kClippedHigh] = sum(SRFT_EACH { return chunk.clipped_high[i]; });
  figures[kMismatch] = sum(gap);
  figures[kMismatchK3] = sum(SRFT_EACH { return chunk.engine_ratio[i] - 1.0f - chunk.engine_gap[i]; });
  figures[kMaxRatio] = largest_of(chunk, counts, ratio, figures[kRatioFigure]);
  figures[kMaxMismatch] = largest_of(chunk, counts, gap, figures[kMismatch]);
  figures[kCorrectedShare] = 0.0;
  if (call.importance_weights == nullptr) return;
  float weight[kChunkRows];
  copy(chunk, call.importance_weights, 1.0f, weight);
  figures[kCorrectedShare] = sum(SRFT_EACH {
    const float usual = chunk.engine_ratio[i];
    return std::fabs(weight[i] - usual) > kRounding * usual ? 1.0f : 0.0f;
  });
}

SRFT_CLONES void run_chunk(const ClippedRatioArguments& call, int64_t start, double* figures) {
  Chunk chunk;
  chunk.start = start;
  chunk.rows = static_cast<int>(call.rows - start < kChunkRows ? call.rows - start : kChunkRows);
  chunk.padded = (chunk.rows + kLanes - 1) / kLanes * kLanes;
  load(call, chunk);
  double* of_terms = figures + 2 * kPopulationFigures;
  for (int index = 0; index < call.terms; ++index) run_term(call, index, chunk, of_terms + index * kTermFigures);
  for (int population = 0; population < 2; ++population) {
    run_population(call, population, chunk, figures + population * kPopulationFigures);
  }
  for (int i = 0; i < chunk.rows; ++i) call.gradients[start + i] = chunk.by_logprob[i];
  if (!call.entropy_gradient) return;
  for (int i = 0; i < chunk.rows; ++i) call.gradients[call.rows + start + i] = chunk.by_entropy[i];
}

}  // namespace

int64_t clipped_ratio_chunks(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

void clipped_ratio_rows(const ClippedRatioArguments& call, double* partial, int64_t first_chunk, int64_t end_chunk) {
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    run_chunk(call, chunk * kChunkRows, partial + chunk * figure_count(call));
  }
}

void clipped_ratio_total(const ClippedRatioArguments& call, const double* partial) {
  const int count = figure_count(call);
  const int64_t chunks = clipped_ratio_chunks(call.rows);
  double loss = 0.0;
  for (int figure = 0; figure < count; ++figure) {
    double total = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double value = partial[chunk * count + figure];
      total = !is_maximum(figure) ? total + value : value > total || value != value ? value : total;
    }
    call.figures[figure] = static_cast<float>(total * figure_share(call, figure));
    const int after = figure - 2 * kPopulationFigures;
    if (after >= 0 && after % kTermFigures == kTermLoss) loss += total;
  }
  *call.loss = static_cast<float>(loss);
}

}  // namespace srft::cpu
