//! The target's paths, as far as the proxy tells them apart.

use axum::http::Method;

/// The paths on which a POST makes the target generate.
const COMPLETIONS: [&str; 10] = [
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/completions",
    "/completions",
    "/completion",
    "/v1/responses",
    "/responses",
    "/v1/messages",
    "/infill",
    "/messages",
];

/// Of these, OpenAI's chat completions.
const CHATS: [&str; 2] = ["/v1/chat/completions", "/chat/completions"];

/// Other paths that the metrics know by name.
const NAMED: [&str; 24] = [
    "/v1/models",
    "/models",
    "/v1/embeddings",
    "/embeddings",
    "/embedding",
    "/v1/rerank",
    "/rerank",
    "/v1/reranking",
    "/reranking",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/props",
    "/slots",
    "/lora-adapters",
    "/v1/audio/transcriptions",
    "/v1/chat/completions/input_tokens",
    "/v1/messages/count_tokens",
    "/v1/responses/input_tokens",
    "/api/chat",
    "/api/generate",
    "/api/tags",
    "/v1/health",
    "/",
];

/// What the drafter and the target talk over; no business of clients.
const DRAFT: &[u8] = b"draft";

/// How errors are written for the client of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `{"error": {…}}`
    OpenAi,
    /// `{"type": "error", "error": {…}}`
    Anthropic,
}

impl Dialect {
    /// The dialect of a path's clients.
    pub(crate) fn of(path: &str) -> Self {
        match path {
            "/v1/messages" | "/messages" | "/v1/messages/count_tokens" => Self::Anthropic,
            _ => Self::OpenAi,
        }
    }
}

/// What the proxy knows of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    /// Its name in the metrics: itself, or `other`.
    pub(crate) label: &'static str,
    /// Whether the target generates there.
    pub(crate) completion: bool,
    /// Whether its requests and answers are those of OpenAI's chat completions.
    pub(crate) chat: bool,
    /// Whether clients are kept out.
    pub(crate) hidden: bool,
}

impl Route {
    /// Looks at a path as the target will see it: servers decode it before they compare.
    pub(crate) fn of(method: &Method, path: &str) -> Self {
        let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
        if let Some(label) = COMPLETIONS.into_iter().find(|it| *it == decoded) {
            return Self {
                label,
                completion: method == Method::POST,
                chat: CHATS.contains(&label),
                hidden: false,
            };
        }
        let label = NAMED.into_iter().find(|it| *it == decoded).unwrap_or("other");
        Self {
            label,
            completion: false,
            chat: false,
            hidden: is_draft(path),
        }
    }
}

/// Whether a server may take `path` for `/draft`, however it is spelt.
fn is_draft(path: &str) -> bool {
    let decoded: Vec<u8> = percent_encoding::percent_decode_str(path).collect();
    let mut segments = decoded
        .split(|byte| *byte == b'/')
        .filter(|segment| !segment.is_empty() && *segment != b".");
    segments.next().is_some_and(|first| first.eq_ignore_ascii_case(DRAFT)) && segments.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draft_is_hidden_however_it_is_spelt() {
        for path in [
            "/draft",
            "//draft",
            "/draft/",
            "/%64raft",
            "/./draft",
            "/Draft",
            "/%2e/draft",
            "/%2fdraft",
        ] {
            assert!(Route::of(&Method::POST, path).hidden, "{path}");
        }
        for path in ["/drafts", "/v1/draft", "/draft/1", "/", "/%2564raft"] {
            assert!(!Route::of(&Method::POST, path).hidden, "{path}");
        }
    }

    #[test]
    fn only_a_post_to_a_generating_path_is_a_completion() {
        assert!(Route::of(&Method::POST, "/v1/chat/completions").completion);
        assert!(Route::of(&Method::POST, "/v1/chat/completion%73").completion);
        assert!(!Route::of(&Method::POST, "/v1/chat/completion%2573").completion);
        assert!(!Route::of(&Method::OPTIONS, "/v1/chat/completions").completion);
        assert!(!Route::of(&Method::POST, "/v1/chat/completions/input_tokens").completion);
        assert!(!Route::of(&Method::POST, "/v1/embeddings").completion);
    }

    #[test]
    fn labels_are_bounded() {
        assert_eq!(Route::of(&Method::GET, "/whatever/anybody/sends").label, "other");
    }
}
