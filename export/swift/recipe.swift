extension @@NAME@@ {
    /// What the model was trained with, from the bundle's manifest: @@RECIPE@@.
    static let recipe = Recipe(
        height: @@HEIGHT@@, width: @@WIDTH@@, resize: .@@RESIZE@@, cropPart: @@CROP@@, filter: .@@FILTER@@,
        gray: @@GRAY@@, blueFirst: @@BLUE_FIRST@@, channelsFirst: @@CHANNELS_FIRST@@, padLevel: @@PAD@@,
        scale: @@SCALE@@, mean: @@MEAN@@, std: @@STD@@
    )

    /// From an image to the model's input, step by step as edgekit does it in Python: Apple's own scalers use other
    /// filters and rounding, which changes what a model answers. Levels agree to about 0.001.
    struct Recipe: Sendable {
        enum Resize: Sendable { case squash, shortest, letterbox }
        enum Filter: Sendable { case nearest, bilinear, bicubic, lanczos }

        let height: Int, width: Int
        let resize: Resize
        let cropPart: Double
        let filter: Filter
        let gray: Bool, blueFirst: Bool, channelsFirst: Bool
        let padLevel: Float
        let scale: Float
        let mean: [Float], std: [Float]

        var channels: Int { gray ? 1 : 3 }

        /// Levels 0 to 255 of `height` rows of `width` pixels: red, green and blue, or gray alone.
        func levels(of pixels: Pixels) -> [Float] {
            switch resize {
            case .squash:
                return resized(pixels, height, width, top: 0, left: 0, rows: height, columns: width)
            case .shortest:
                let (fullHeight, fullWidth) = cover(pixels)
                let top = rounded(Double(fullHeight - height) / 2), left = rounded(Double(fullWidth - width) / 2)
                return resized(pixels, fullHeight, fullWidth, top: top, left: left, rows: height, columns: width)
            case .letterbox:
                let ratio = min(Double(height) / Double(pixels.height), Double(width) / Double(pixels.width))
                let innerHeight = max(1, rounded(Double(pixels.height) * ratio))
                let innerWidth = max(1, rounded(Double(pixels.width) * ratio))
                let top = (height - innerHeight) / 2, left = (width - innerWidth) / 2
                let inner = resized(
                    pixels, innerHeight, innerWidth, top: 0, left: 0, rows: innerHeight, columns: innerWidth)
                var result = [Float](repeating: padLevel, count: height * width * channels)
                for y in 0..<innerHeight {
                    for index in 0..<innerWidth * channels {
                        result[((top + y) * width + left) * channels + index] = inner[y * innerWidth * channels + index]
                    }
                }
                return result
            }
        }

        /// The same levels as bytes, halves rounded to even.
        func bytes(of pixels: Pixels) -> [UInt8] {
            levels(of: pixels).map { UInt8(min(max($0.rounded(.toNearestOrEven), 0), 255)) }
        }

        /// The model's input where it takes numbers: `(level * scale - mean) / std`, in the model's layout.
        func normalized(_ pixels: Pixels) -> [Float] {
            let levels = self.levels(of: pixels), area = height * width, channels = self.channels
            var result = [Float](repeating: 0, count: levels.count)
            for place in 0..<area {
                for channel in 0..<channels {
                    let from = place * channels + (blueFirst ? channels - 1 - channel : channel)
                    let to = channelsFirst ? channel * area + place : place * channels + channel
                    result[to] = (levels[from] * scale - mean[channel]) / std[channel]
                }
            }
            return result
        }

        /// The smallest size of the image's aspect that covers `size / cropPart`.
        private func cover(_ pixels: Pixels) -> (Int, Int) {
            let leastHeight = rounded(Double(height) / cropPart), leastWidth = rounded(Double(width) / cropPart)
            if leastHeight * pixels.width >= leastWidth * pixels.height {
                return (leastHeight, max(leastWidth, leastHeight * pixels.width / pixels.height))
            }
            return (max(leastHeight, leastWidth * pixels.height / pixels.width), leastWidth)
        }

        private func rounded(_ value: Double) -> Int { Int(value.rounded(.toNearestOrEven)) }

        /// A part of the image scaled to a full height and width: along the width first, then along the height.
        private func resized(
            _ pixels: Pixels, _ fullHeight: Int, _ fullWidth: Int, top: Int, left: Int, rows: Int, columns: Int
        ) -> [Float] {
            let channels = self.channels
            let across = weights(pixels.width, fullWidth, from: left, count: columns)
            let down = weights(pixels.height, fullHeight, from: top, count: rows)
            let firstRow = down.map(\.first).min() ?? 0
            let endRow = down.map { $0.first + $0.weights.count }.max() ?? 0
            let length = columns * channels
            var narrow = [Float](repeating: 0, count: (endRow - firstRow) * length)
            var row = [Float](repeating: 0, count: pixels.width * channels)
            for y in firstRow..<endRow {
                pixels.read(row: y, gray: gray, into: &row)
                for x in 0..<columns {
                    let tap = across[x]
                    for channel in 0..<channels {
                        var sum = 0.0
                        for (index, weight) in tap.weights.enumerated() {
                            sum += Double(weight) * Double(row[(tap.first + index) * channels + channel])
                        }
                        narrow[(y - firstRow) * length + x * channels + channel] = min(max(Float(sum), 0), 255)
                    }
                }
            }
            var result = [Float](repeating: 0, count: rows * length)
            for y in 0..<rows {
                let tap = down[y]
                for index in 0..<length {
                    var sum = 0.0
                    for (step, weight) in tap.weights.enumerated() {
                        sum += Double(weight) * Double(narrow[(tap.first + step - firstRow) * length + index])
                    }
                    result[y * length + index] = min(max(Float(sum), 0), 255)
                }
            }
            return result
        }

        /// The pixels that an output looks at, from `first` on, and how much each counts.
        struct Tap: Equatable, Sendable {
            let first: Int
            let weights: [Float]
        }

        /// The taps of `count` outputs, from `start` on, of `input` pixels scaled to `output`: Pillow's convention. The
        /// centre of pixel i is i + 0.5, and a filter is stretched by the factor of shrinking, never compressed.
        func weights(_ input: Int, _ output: Int, from start: Int, count: Int) -> [Tap] {
            if input == output { return (start..<start + count).map { Tap(first: $0, weights: [1]) } }
            if filter == .nearest {
                return (start..<start + count).map { Tap(first: (2 * $0 + 1) * input / (2 * output), weights: [1]) }
            }
            let step = Double(input) / Double(output), stretch = max(step, 1)
            let reach = support * stretch
            return (start..<start + count).map { place in
                let centre = (Double(place) + 0.5) * step
                let low = max(Int((centre - reach).rounded(.down)), 0)
                let high = min(Int((centre + reach).rounded(.up)), input)
                let values = (low..<high).map { pixel -> Double in
                    let distance = abs(Double(pixel) + 0.5 - centre) / stretch
                    return distance < support ? kernel(distance) : 0
                }
                let sum = values.reduce(0, +)
                return Tap(first: low, weights: values.map { Float($0 / sum) })
            }
        }

        private var support: Double {
            switch filter {
            case .nearest, .bilinear: return 1
            case .bicubic: return 2
            case .lanczos: return 3
            }
        }

        /// The filter at a distance of at least 0 and below `support`. Bicubic is Keys' (1981) with a = -0.5.
        private func kernel(_ x: Double) -> Double {
            switch filter {
            case .nearest, .bilinear: return 1 - x
            case .bicubic: return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-0.5 * x + 2.5) * x - 4) * x + 2
            case .lanczos: return sinc(x) * sinc(x / 3)
            }
        }

        private func sinc(_ x: Double) -> Double { x == 0 ? 1 : sin(Double.pi * x) / (Double.pi * x) }
    }
}
