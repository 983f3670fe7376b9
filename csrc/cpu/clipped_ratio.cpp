// Policy losses on a CPU. Each vector of rows is read once, goes through all terms, and is added to every figure's
// lanes, which stay in the first cache. There are no branches on a row's content but for populations that have no row
// in the vector (rows of a sequence stand together, so mostly there is one).
#include "cpu/vectors.h"  // first: it silences a warning of functions over vectors

#include "cpu/clipped_ratio.h"

namespace srft {

template <>
SRFT_HD cpu::Floats exponential_of(const cpu::Floats& x) {
  const cpu::Floats low = cpu::all(kExponentLow), high = cpu::all(kExponentHigh);
  const cpu::Floats raised = x < low ? low : x;  // written so that NaN passes
  return cpu::exponential_in_range(raised > high ? high : raised);
}

}  // namespace srft

namespace srft::cpu {
namespace {

constexpr int kChunkRows = 512;  // whole vectors
constexpr int kNobody = 2;       // population where there is no row

typedef int32_t Mask __attribute__((vector_size(kLength * sizeof(int32_t))));  // of each lane all bits, or none

SRFT_HD Mask mask_of(bool value) { return Mask{} - static_cast<int32_t>(value); }

SRFT_HD bool any(const Mask& mask) {
  uint64_t words[kLength / 2];
  std::memcpy(words, &mask, sizeof mask);
  return (words[0] | words[1] | words[2] | words[3]) != 0;
}

// Zero in the other lanes. Casts between vectors keep the bits.
SRFT_HD Floats where(const Mask& mask, const Floats& value) { return (Floats)((Mask)value & mask); }

SRFT_HD Floats magnitude(const Floats& value) { return (Floats)((Mask)value & 0x7fffffff); }

// A vector's rows; the last vector of a call may have fewer than it has lanes.
template <bool kWhole>
struct Place {
  int64_t start;
  int rows;

  SRFT_HD Floats load(const float* from, float otherwise) const {
    Floats values = all(otherwise);
    if (from == nullptr) return values;
    std::memcpy(&values, from + start, kWhole ? sizeof values : rows * sizeof(float));
    return values;
  }

  SRFT_HD Mask populations(const uint8_t* is_demonstration) const {
    static_assert(kLength == 8);
    uint8_t kinds[kLength] = {kNobody, kNobody, kNobody, kNobody, kNobody, kNobody, kNobody, kNobody};
    std::memcpy(kinds, is_demonstration + start, kWhole ? kLength : rows);
    int32_t halves[2];
    std::memcpy(halves, kinds, sizeof halves);
    const int32_t low = halves[0], high = halves[1];
    const Mask words{low, low, low, low, high, high, high, high}, shifts{0, 8, 16, 24, 0, 8, 16, 24};
    return words >> shifts & 0xff;
  }

  SRFT_HD void store(const Floats& values, float* to) const {
    std::memcpy(to + start, &values, kWhole ? sizeof values : rows * sizeof(float));
  }
};

// A term as a chunk's rows need it.
struct TermOfChunk {
  const float *advantages, *weights, *lengths, *importance;  // null: 1
  Mask sums[2][2];  // does it sum rows of a population with A > 0, the others?
  Mask counts[2];   // is the population one of its own?
};

// Lanes of the sums and largest values of a chunk.
struct Chunk {
  TermOfChunk term[kMaxTerms];
  Floats low, high;  // where log-ratios are clamped
  Floats lanes[kMaxFigures];

  SRFT_HD void add(int figure, const Floats& value) { lanes[figure] += value; }
  SRFT_HD void keep_larger(int figure, const Floats& value) { lanes[figure] = larger(lanes[figure], value); }
};

SRFT_HD void start(const ClippedRatioArguments& call, Chunk& chunk) {
  chunk.low = hidden(-kLogRatioLimit);
  chunk.high = hidden(kLogRatioLimit);
  for (int figure = 0; figure < figure_count(call); ++figure) chunk.lanes[figure] = Floats{};
  for (int index = 0; index < call.terms; ++index) {
    const int bits = call.term[index].rows;
    TermOfChunk& own = chunk.term[index];
    own.advantages = advantages_of(call, index);
    own.weights = weights_of(call, index);
    own.lengths = bits & kPerLength ? call.response_lengths : nullptr;
    own.importance = bits & kCorrected ? call.importance_weights : nullptr;
    for (int population = 0; population < 2; ++population) {
      for (int sign = 0; sign < 2; ++sign) own.sums[population][sign] = mask_of(bits >> (2 * population + sign) & 1);
      own.counts[population] = mask_of(in_population_of(bits, population));
    }
  }
}

// What terms and figures take of a vector of rows, and what the terms leave.
struct Rows {
  Mask population[2];
  Floats logprob, entropy;
  Floats log_ratio, ratio, slope;
  Floats engine_gap, engine_ratio;  // old policy beside the engine; 0 and 1 of demonstrations
  Floats by_logprob{}, by_entropy{}, clipped_low{}, clipped_high{};
};

template <int kLoss, bool kWhole>
SRFT_HD void run_term(const PolicyTerm& term, int index, const Place<kWhole>& place, Rows& rows, Chunk& chunk) {
  const TermOfChunk& own = chunk.term[index];
  const Floats advantage = place.load(own.advantages, 1.0f);
  const Floats weight = place.load(own.weights, 1.0f);
  Floats factor = weight * term.scale;
  if (own.lengths != nullptr) factor /= place.load(own.lengths, 1.0f);
  if (own.importance != nullptr) factor *= place.load(own.importance, 1.0f);
  const Mask positive = advantage > 0.0f;
  const Mask chosen = (rows.population[0] & (positive ? own.sums[0][0] : own.sums[0][1])) |
                      (rows.population[1] & (positive ? own.sums[1][0] : own.sums[1][1]));
  const TokenLoss<Floats> loss =
      token_loss(kLoss, term, rows.logprob, rows.entropy, rows.ratio, rows.slope, advantage);
  if constexpr (kLoss == kEntropy) {
    rows.by_entropy += where(chosen, factor * loss.by_entropy);
  } else {
    rows.by_logprob += where(chosen, factor * loss.by_logprob);
  }
  if constexpr (kLoss == kClipped) {
    rows.clipped_low += where(chosen, loss.clipped_low);
    rows.clipped_high += where(chosen, loss.clipped_high);
  }
  const int figures = 2 * kPopulationFigures + index * kTermFigures;
  const Floats counted =
      where((rows.population[0] & own.counts[0]) | (rows.population[1] & own.counts[1]), weight);
  chunk.add(figures + kTermLoss, where(chosen, factor * loss.value));
  chunk.add(figures + kWeight, counted);
  chunk.keep_larger(figures + kMaxWeight, counted);
}

// run_term with the loss as a constant.
template <int kLoss = 0, bool kWhole>
SRFT_HD void run_term_of(const PolicyTerm& term, int index, const Place<kWhole>& place, Rows& rows, Chunk& chunk) {
  if (term.loss == kLoss) {
    run_term<kLoss>(term, index, place, rows, chunk);
  } else if constexpr (kLoss + 1 < kLossCount) {
    run_term_of<kLoss + 1>(term, index, place, rows, chunk);
  }
}

SRFT_HD void add_population(int population, const Rows& rows, Chunk& chunk) {
  const Mask& counts = rows.population[population];
  const int figures = population * kPopulationFigures;
  const Floats ratio = where(counts, rows.ratio);
  chunk.add(figures + kNllFigure, where(counts, -rows.logprob));
  chunk.add(figures + kEntropyFigure, where(counts, rows.entropy));
  chunk.add(figures + kRatioFigure, ratio);
  chunk.add(figures + kK1, where(counts, -rows.log_ratio));
  chunk.add(figures + kK3, where(counts, rows.ratio - 1.0f - rows.log_ratio));
  chunk.add(figures + kClippedLow, where(counts, rows.clipped_low));
  chunk.add(figures + kClippedHigh, where(counts, rows.clipped_high));
  chunk.keep_larger(figures + kMaxRatio, ratio);
}

// Figures of the rollout engine, which demonstrations do not have. But their weights may have been corrected.
template <bool kWhole>
SRFT_HD void add_engine(const float* importance_weights, const Place<kWhole>& place, const Rows& rows, Chunk& chunk) {
  const Floats gap = magnitude(rows.engine_gap);
  chunk.add(kMismatch, gap);
  chunk.add(kMismatchK3, where(rows.population[0], rows.engine_ratio - 1.0f - rows.engine_gap));
  chunk.keep_larger(kMaxMismatch, gap);
  if (importance_weights == nullptr) return;
  const Floats distance = magnitude(place.load(importance_weights, 1.0f) - rows.engine_ratio);
  const Floats corrected = where(distance > rows.engine_ratio * kRounding, all(1.0f));
  chunk.add(kCorrectedShare, where(rows.population[0], corrected));
  chunk.add(kPopulationFigures + kCorrectedShare, where(rows.population[1], corrected));
}

template <bool kWhole>
SRFT_HD void run_rows(const ClippedRatioArguments& call, const Place<kWhole>& place, Chunk& chunk) {
  Rows rows;
  const Mask populations = place.populations(call.is_demonstration);
  rows.population[0] = populations == 0;
  rows.population[1] = populations == 1;
  const bool present[2] = {any(rows.population[0]), any(rows.population[1])};
  rows.logprob = place.load(call.logprobs, 0.0f);
  rows.entropy = place.load(call.entropy, 0.0f);
  const Floats old = call.old_logprobs != nullptr ? place.load(call.old_logprobs, 0.0f) : rows.logprob;
  const Floats log_ratio = rows.logprob - old;
  const Floats engine_gap = where(rows.population[0], old - place.load(call.engine_logprobs, 0.0f));
  rows.log_ratio = smaller(chunk.high, larger(chunk.low, log_ratio));  // in this order NaN passes
  rows.engine_gap = smaller(chunk.high, larger(chunk.low, engine_gap));
  rows.ratio = exponential_in_range(rows.log_ratio);
  rows.engine_ratio = exponential_in_range(rows.engine_gap);
  rows.slope = where(~(magnitude(log_ratio) > kLogRatioLimit), rows.ratio);
  for (int index = 0; index < call.terms; ++index) {
    const PolicyTerm& term = call.term[index];
    if ((present[0] && term.rows & kRolloutRows) || (present[1] && term.rows & kDemonstrationRows)) {
      run_term_of(term, index, place, rows, chunk);
    }
  }
  for (int population = 0; population < 2; ++population) {
    if (present[population]) add_population(population, rows, chunk);
  }
  if (present[0] || call.importance_weights != nullptr) add_engine(call.importance_weights, place, rows, chunk);
  place.store(rows.by_logprob, call.gradients);
  if (call.entropy_gradient) place.store(rows.by_entropy, call.gradients + call.rows);
}

// The largest of a figure's lanes; NaN if there was one, which the lanes of its sum tell.
SRFT_HD double largest_of(const Floats& lanes, double sum) {
  float largest = 0.0f;
  for (int lane = 0; lane < kLength; ++lane) largest = srft::larger(lanes[lane], largest);
  return std::isnan(sum) ? sum : largest;
}

// The figure that sums what the given one takes the largest of.
SRFT_HD int sum_beside(int figure) {
  if (figure >= 2 * kPopulationFigures) return figure - kMaxWeight + kWeight;
  const int own = figure % kPopulationFigures;
  return figure - own + (own == kMaxRatio ? kRatioFigure : kMismatch);
}

SRFT_CLONES void run_chunk(const ClippedRatioArguments& call, int64_t first, double* figures) {
  Chunk chunk;
  start(call, chunk);
  const int64_t end = call.rows - first < kChunkRows ? call.rows : first + kChunkRows;
  for (; first + kLength <= end; first += kLength) run_rows(call, Place<true>{first, kLength}, chunk);
  if (first < end) run_rows(call, Place<false>{first, static_cast<int>(end - first)}, chunk);
  for (int figure = 0; figure < figure_count(call); ++figure) {
    const Floats& own = chunk.lanes[figure];
    figures[figure] = is_maximum(figure) ? largest_of(own, total(chunk.lanes[sum_beside(figure)])) : total(own);
  }
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
