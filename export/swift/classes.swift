extension @@NAME@@ {
    /// One class: its index, its label (nil where the model has none), its probability (0 to 1) and the model's score.
    public struct Prediction: Equatable, Sendable {
        /// The place of the class among the scores.
        public let index: Int
        /// The name of the class.
        public let label: String?
        /// The softmax of the scores at this class.
        public let probability: Float
        /// What the model gave for this class.
        public let score: Float
    }

    /// The names of the classes, in the order of the scores; nil where the model has none.
    public static let labels: [String]? = @@LABELS@@

    /// The likeliest classes, likeliest first; of equal ones the lower index comes first.
    ///
    /// - Parameters:
    ///   - scores: one for each class, before softmax.
    ///   - count: how many classes, at least 1; all where there are fewer.
    /// - Throws: `Failure.badInput` for a count below 1, `Failure.badOutput` for scores that are no numbers.
    public static func likeliest(_ scores: [Float], count: Int = 5) throws -> [Prediction] {
        guard count >= 1 else { throw Failure.badInput("expected a count of at least 1, got \(count)") }
        guard let best = scores.max(), scores.allSatisfy({ $0.isFinite }) else {
            throw Failure.badOutput("expected finite scores, got none, NaN or infinity; check the image, or export as fp32")
        }
        if let labels, labels.count != scores.count {
            throw Failure.badOutput("there are \(labels.count) labels for \(scores.count) scores; export the model again")
        }
        let powers = scores.map { exp($0 - best) }
        let sum = powers.reduce(0, +)
        let order = scores.indices.sorted { scores[$0] > scores[$1] || (scores[$0] == scores[$1] && $0 < $1) }
        return order.prefix(count).map { index in
            Prediction(index: index, label: labels?[index], probability: powers[index] / sum, score: scores[index])
        }
    }
}
