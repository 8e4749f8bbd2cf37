// Runs what a generated package computes around its model. `Package` is its main type. Reads JSON, writes JSON.

import Foundation

struct Case: Decodable {
    let height: Int, width: Int
    let resize: String, interpolation: String, color: String, layout: String
    let cropPart: Double
    let padLevel: Float, scale: Float
    let mean: [Float], std: [Float]
    let imageWidth: Int, imageHeight: Int
    let levels: [UInt8]
}

struct Answer: Encodable {
    let levels: [Float], bytes: [Int], normalized: [Float]
}

let resizes: [String: Package.Recipe.Resize] = ["squash": .squash, "shortest": .shortest, "letterbox": .letterbox]
let filters: [String: Package.Recipe.Filter] = [
    "nearest": .nearest, "bilinear": .bilinear, "bicubic": .bicubic, "lanczos": .lanczos,
]

let cases = try JSONDecoder().decode([Case].self, from: FileHandle.standardInput.readDataToEndOfFile())
let answers = try cases.map { given -> Answer in
    let recipe = Package.Recipe(
        height: given.height, width: given.width, resize: resizes[given.resize]!, cropPart: given.cropPart,
        filter: filters[given.interpolation]!, gray: given.color == "gray", blueFirst: given.color == "bgr",
        channelsFirst: given.layout == "NCHW", padLevel: given.padLevel, scale: given.scale, mean: given.mean,
        std: given.std)
    let image = try Package.Pixels(width: given.imageWidth, height: given.imageHeight, levels: given.levels)
    return Answer(
        levels: recipe.levels(of: image), bytes: recipe.bytes(of: image).map { Int($0) },
        normalized: recipe.normalized(image))
}
let encoder = JSONEncoder()
FileHandle.standardOutput.write(try encoder.encode(answers))
