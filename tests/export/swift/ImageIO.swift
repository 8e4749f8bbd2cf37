// Just enough of Image I/O for the compiler; see CoreML.swift.

import CoreGraphics
import Foundation

public class CGImageSource {}
public let kCGImagePropertyOrientation: CFString = ""
public func CGImageSourceCreateWithURL(_ url: CFURL, _ options: CFDictionary?) -> CGImageSource? { fatalError() }
public func CGImageSourceCreateImageAtIndex(_ source: CGImageSource, _ index: Int, _ options: CFDictionary?) -> CGImage? {
    fatalError()
}
public func CGImageSourceCopyPropertiesAtIndex(_ source: CGImageSource, _ index: Int, _ options: CFDictionary?)
    -> [AnyHashable: Any]?
{ fatalError() }
