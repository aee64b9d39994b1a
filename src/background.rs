//! Background tasks whose panic is logged, and then either cured by a restart or handed to the caller.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::future::FutureExt;
use tokio::time::sleep;

/// Pause before a task that panicked is restarted.
const PAUSE: Duration = Duration::from_secs(1);

/// A task has panicked.
#[derive(Debug, thiserror::Error)]
#[error("{what} has failed ({reason}); this is an error in Tightwad, please report it")]
pub struct Panicked {
    what: String,
    reason: String,
}

/// Runs the task that `begin` makes and restarts it after a pause when it panics.
pub async fn kept_running<F: Future<Output = ()>>(what: &str, mut begin: impl FnMut() -> F) {
    while let Err(panic) = AssertUnwindSafe(async { begin().await }).catch_unwind().await {
        let reason = reason(&*panic);
        tracing::error!(
            "{what} has failed ({reason}) and is begun anew; this is an error in Tightwad, please report it"
        );
        sleep(PAUSE).await;
    }
}

/// Runs a task to its end, or until it panics.
pub async fn contained<T>(what: &str, task: impl Future<Output = T>) -> Result<T, Panicked> {
    AssertUnwindSafe(task).catch_unwind().await.map_err(|panic| {
        let panicked = Panicked {
            what: what.to_owned(),
            reason: reason(&*panic).to_owned(),
        };
        tracing::error!("{panicked}");
        panicked
    })
}

/// The message of a panic.
fn reason(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no reason given")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_begun_anew_until_it_ends() {
        let begun = Cell::new(0);
        let task = || {
            begun.set(begun.get() + 1);
            let panics = begun.get() < 3;
            // Some panic before they are polled.
            assert!(begun.get() != 1, "at once");
            async move {
                tokio::task::yield_now().await;
                assert!(!panics, "later");
            }
        };
        kept_running("the task", task).await;
        assert_eq!(begun.get(), 3);
    }

    #[tokio::test]
    async fn a_task_that_panics_takes_nothing_with_it() {
        let panicked = contained("the task", async { panic!("at {}", 1) }).await;
        let words = panicked.unwrap_err().to_string();
        assert!(words.starts_with("the task has failed (at 1)"), "{words}");
    }
}
