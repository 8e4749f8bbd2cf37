// Just enough of Core ML for the compiler to check generated code where there is none. Signatures from Apple's
// documentation (https://developer.apple.com/documentation/coreml); nothing here computes.

import CoreVideo
import Foundation

public enum MLComputeUnits: Int, Sendable { case cpuOnly, cpuAndGPU, all, cpuAndNeuralEngine }

public class MLModelConfiguration {
    public init() {}
    public var computeUnits: MLComputeUnits = .all
    public var functionName: String?
}

public class MLPredictionOptions {
    public init() {}
}

public protocol MLShapedArrayScalar {}
extension Float: MLShapedArrayScalar {}
extension Double: MLShapedArrayScalar {}
extension Int32: MLShapedArrayScalar {}

public protocol MLShapedArrayProtocol<Scalar> {
    associatedtype Scalar: MLShapedArrayScalar
    var shape: [Int] { get }
    var scalars: [Scalar] { get set }
    init(converting multiArray: MLMultiArray)
    init<S: Sequence>(scalars: S, shape: [Int]) where S.Element == Scalar
}

public struct MLShapedArray<Scalar: MLShapedArrayScalar>: MLShapedArrayProtocol {
    public var shape: [Int] { fatalError() }
    public var scalars: [Scalar] { get { fatalError() } set { fatalError() } }
    public init(_ multiArray: MLMultiArray) { fatalError() }
    public init(converting multiArray: MLMultiArray) { fatalError() }
    public init<S: Sequence>(scalars: S, shape: [Int]) where S.Element == Scalar { fatalError() }
}

public class MLMultiArray {
    public convenience init<A: MLShapedArrayProtocol>(_ shapedArray: A) { fatalError() }
    init() {}
    public subscript(index: Int) -> NSNumber { get { fatalError() } set { fatalError() } }
    public subscript(key: [NSNumber]) -> NSNumber { get { fatalError() } set { fatalError() } }
}

public class MLFeatureValue {
    public convenience init(multiArray value: MLMultiArray) { fatalError() }
    public convenience init(pixelBuffer value: CVPixelBuffer) { fatalError() }
    init() {}
    public var multiArrayValue: MLMultiArray? { fatalError() }
}

public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

public class MLDictionaryFeatureProvider: MLFeatureProvider {
    public init(dictionary: [String: Any]) throws {}
    public var featureNames: Set<String> { fatalError() }
    public func featureValue(for featureName: String) -> MLFeatureValue? { fatalError() }
}

public class MLState {
    public func withMultiArray<R>(for stateName: String, _ body: (MLMultiArray) throws -> R) rethrows -> R { fatalError() }
}

public class MLModel {
    public class func compileModel(at modelURL: URL) throws -> URL { fatalError() }
    public class func compileModel(at modelURL: URL) async throws -> URL { fatalError() }
    public class func load(contentsOf url: URL, configuration: MLModelConfiguration = MLModelConfiguration()) async throws
        -> MLModel
    { fatalError() }
    public func makeState() -> MLState { fatalError() }
    public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider { fatalError() }
    public func prediction(from input: any MLFeatureProvider, options: MLPredictionOptions = MLPredictionOptions())
        async throws -> any MLFeatureProvider
    { fatalError() }
    public func prediction(from input: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
        fatalError()
    }
    public func prediction(
        from input: any MLFeatureProvider, using state: MLState, options: MLPredictionOptions = MLPredictionOptions()
    ) async throws -> any MLFeatureProvider { fatalError() }
}
