use serde_json::Value;

/// The request `body` with the fields of `more`, which win.
pub fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else {
        panic!("not an object: {more}")
    };
    for (key, value) in more {
        body[key] = value;
    }
    body
}
