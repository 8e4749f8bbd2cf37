extension @@NAME@@ {
    /// How the next token is chosen.
    public struct Sampling: Equatable, Sendable {
        /// 0 takes the likeliest token; above 0, tokens are drawn from softmax(scores / temperature).
        public var temperature: Double
        /// The probability, above 0 and at most 1, that the fewest likeliest tokens must reach together; only these may
        /// be drawn (nucleus sampling, arXiv 1904.09751).
        public var topP: Double
        /// Makes draws repeatable. They are not those of edgekit in Python, whose generator is another.
        public var seed: UInt64

        /// The likeliest token by default.
        public init(temperature: Double = 0, topP: Double = 1, seed: UInt64 = 0) {
            self.temperature = temperature
            self.topP = topP
            self.seed = seed
        }
    }

    /// Chooses the tokens of one text.
    struct Sampler {
        private let sampling: Sampling
        private var state: UInt64

        init(_ sampling: Sampling) throws {
            guard sampling.temperature >= 0, sampling.temperature.isFinite else {
                throw Failure.badInput("temperature must be at least 0, got \(sampling.temperature)")
            }
            guard sampling.topP > 0, sampling.topP <= 1 else {
                throw Failure.badInput("topP must be above 0 and at most 1, got \(sampling.topP)")
            }
            self.sampling = sampling
            state = sampling.seed
        }

        /// The id of the next token; of equal scores that with the lowest id.
        mutating func choose(_ scores: [Float]) throws -> Int {
            guard let best = scores.max(), best.isFinite, !scores.contains(where: \.isNaN) else {
                throw Failure.badOutput("the model's scores for the next token are no numbers; export it as fp32")
            }
            guard sampling.temperature > 0 else { return scores.firstIndex(of: best) ?? 0 }
            let weights = scores.map { exp((Double($0) - Double(best)) / sampling.temperature) }
            let order = weights.indices.sorted { weights[$0] > weights[$1] || (weights[$0] == weights[$1] && $0 < $1) }
            let wanted = sampling.topP * weights.reduce(0, +)
            var kept: [(token: Int, sum: Double)] = []
            var sum = 0.0
            for token in order where sum < wanted || kept.isEmpty {
                sum += weights[token]
                kept.append((token, sum))
            }
            let point = uniform() * sum
            return kept.first { point < $0.sum }?.token ?? kept[kept.count - 1].token
        }

        /// A number in 0..<1 (SplitMix64; Steele, Lea and Flood, OOPSLA 2014).
        private mutating func uniform() -> Double {
            state &+= 0x9E37_79B9_7F4A_7C15
            var bits = state
            bits = (bits ^ (bits >> 30)) &* 0xBF58_476D_1CE4_E5B9
            bits = (bits ^ (bits >> 27)) &* 0x94D0_49BB_1331_11EB
            return Double((bits ^ (bits >> 31)) >> 11) * 0x1p-53
        }
    }
}
