//! Replaces `${VAR}` in the strings of the cluster file. Pure.

/// Replaces each `${VAR}` by `lookup(VAR)` and each `$${` by a literal `${`. Any other `$` stays.
pub(super) fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        if rest[..start].ends_with('$') {
            expanded.push_str(&rest[..start - 1]);
            expanded.push_str("${");
            rest = &rest[start + 2..];
            continue;
        }
        expanded.push_str(&rest[..start]);
        let Some(end) = rest[start..].find('}') else {
            return Err("`${` without its `}`; write `$${` for a literal `${`".into());
        };
        let name = &rest[start + 2..start + end];
        if !is_variable_name(name) {
            return Err(format!(
                "`${{{name}}}` does not name a variable; write `$${{` for a literal `${{`"
            ));
        }
        let value = lookup(name).ok_or_else(|| format!("the environment variable {name} is not set"))?;
        expanded.push_str(&value);
        rest = &rest[start + end + 1..];
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn is_variable_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lookup(name: &str) -> Option<String> {
        (name == "SET").then(|| "${value}".to_owned())
    }

    #[test]
    fn a_variable_is_replaced_once_and_a_doubled_dollar_is_literal() {
        assert_eq!(
            expand("a ${SET} b $${SET} $SET $", lookup).unwrap(),
            "a ${value} b ${SET} $SET $"
        );
    }

    #[test]
    fn what_cannot_be_replaced_is_an_error_that_says_why() {
        assert_eq!(
            expand("${UNSET}", lookup).unwrap_err(),
            "the environment variable UNSET is not set"
        );
        assert!(expand("${SET", lookup).unwrap_err().contains("without its"));
        assert!(
            expand("${SET:-x}", lookup)
                .unwrap_err()
                .contains("does not name a variable")
        );
    }

    proptest! {
        #[test]
        fn it_never_panics(text in "([$][{]?|[}]|SET|\\PC){0,20}") {
            let _ = expand(&text, lookup);
        }

        #[test]
        fn an_escaped_text_comes_back(text in "([$][{]|[}]|[a-z ]|é){0,20}") {
            prop_assert_eq!(expand(&text.replace("${", "$${"), lookup).unwrap(), text);
        }
    }
}
