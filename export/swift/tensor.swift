extension @@NAME@@ {
    /// Numbers in rows: the last axis runs fastest.
    public struct Tensor<Scalar: Equatable & Sendable>: Equatable, Sendable {
        /// The size of each axis.
        public let shape: [Int]
        /// The numbers, as many as the product of the sizes.
        public let values: [Scalar]

        /// Throws `Failure.badInput` where the shape asks for another number of values.
        public init(shape: [Int], values: [Scalar]) throws {
            guard shape.allSatisfy({ $0 >= 0 }), shape.reduce(1, *) == values.count else {
                throw Failure.badInput("a tensor of shape \(shape) cannot hold \(values.count) values")
            }
            self.shape = shape
            self.values = values
        }
    }

    /// Throws `Failure.badInput` unless `shape` is as the model wants it: each axis one of the sizes, or of any size.
    static func check(_ name: String, _ shape: [Int], against axes: [Axis]) throws {
        guard shape.count == axes.count, zip(shape, axes).allSatisfy({ size, axis in axis.admits(size) }) else {
            let wanted = axes.map(\.description).joined(separator: ", ")
            throw Failure.badInput("the model takes \(name) of shape [\(wanted)], got \(shape)")
        }
    }

    /// The sizes that one axis of an input may have.
    enum Axis: CustomStringConvertible, Sendable {
        case fixed(Int)
        case range(Int, Int?)
        case choice([Int])

        func admits(_ size: Int) -> Bool {
            switch self {
            case .fixed(let wanted): return size == wanted
            case .range(let least, let most): return size >= least && size <= most ?? Int.max
            case .choice(let sizes): return sizes.contains(size)
            }
        }

        var description: String {
            switch self {
            case .fixed(let wanted): return String(wanted)
            case .range(let least, let most): return "\(least)..." + (most.map { String($0) } ?? "")
            case .choice(let sizes): return sizes.map { String($0) }.joined(separator: "/")
            }
        }
    }
}
