//! Expressions over properties: `input_tokens + 4 * usage.output_tokens`.
//!
//! Parsed by the library [`exmex`], evaluated on exact decimals. Every operator is
//! declared non-commutative: steps are done in the order in which they are written,
//! so that rounding does not depend on the library.

use std::str::FromStr;

use exmex::prelude::*;
use exmex::{BinOp, MakeOperators, Operator, ops_factory};

use super::decimal::{Decimal, DecimalError, Rounding};

/// A value, or why there is none.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Exact(Result<Decimal, ExpressionError>);

/// Why an expression has no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExpressionError {
    #[error("divides by zero")]
    DivisionByZero,
    #[error("needs more than 38 digits at 18 decimal places")]
    Overflow,
    #[error("is not a number")]
    Syntax,
}

impl From<DecimalError> for ExpressionError {
    fn from(error: DecimalError) -> Self {
        match error {
            DecimalError::Overflow => ExpressionError::Overflow,
            DecimalError::Syntax => ExpressionError::Syntax,
        }
    }
}

impl Default for Exact {
    fn default() -> Self {
        Exact(Ok(Decimal::ZERO))
    }
}

impl FromStr for Exact {
    type Err = DecimalError;
    fn from_str(text: &str) -> Result<Self, DecimalError> {
        text.parse().map(|value| Exact(Ok(value)))
    }
}

type Step = fn(Decimal, Decimal) -> Result<Decimal, ExpressionError>;

/// A binary step: the first failure is the one to tell.
fn both(a: Exact, b: Exact, step: Step) -> Exact {
    Exact(a.0.and_then(|a| b.0.and_then(|b| step(a, b))))
}

fn one(a: Exact, step: fn(Decimal) -> Result<Decimal, DecimalError>) -> Exact {
    Exact(a.0.and_then(|a| Ok(step(a)?)))
}

const fn binary(prio: i64, apply: fn(Exact, Exact) -> Exact) -> BinOp<Exact> {
    BinOp { apply, prio, is_commutative: false }
}

/// The names of functions: any other name is a property.
const FUNCTIONS: [&str; 6] = ["min", "max", "abs", "floor", "ceil", "round"];

ops_factory!(
    Operators,
    Exact,
    Operator::make_bin_unary("+", binary(0, |a, b| both(a, b, |a, b| Ok(a.checked_add(b)?))), |a| a),
    Operator::make_bin_unary("-", binary(0, |a, b| both(a, b, |a, b| Ok(a.checked_sub(b)?))), |a| one(a, |a| Decimal::ZERO
        .checked_sub(a))),
    Operator::make_bin("*", binary(1, |a, b| both(a, b, |a, b| Ok(a.checked_mul(b)?)))),
    Operator::make_bin(
        "/",
        binary(1, |a, b| {
            both(a, b, |a, b| if b.is_zero() { Err(ExpressionError::DivisionByZero) } else { Ok(a.checked_div(b)?) })
        })
    ),
    Operator::make_bin("min", binary(2, |a, b| both(a, b, |a, b| Ok(a.min(b))))),
    Operator::make_bin("max", binary(2, |a, b| both(a, b, |a, b| Ok(a.max(b))))),
    Operator::make_unary("abs", |a| one(a, |a| Ok(a.abs()))),
    Operator::make_unary("floor", |a| one(a, |a| a.round_with(0, Rounding::Down))),
    Operator::make_unary("ceil", |a| one(a, |a| a.round_with(0, Rounding::Up))),
    Operator::make_unary("round", |a| one(a, |a| a.round(0)))
);

/// An expression, parsed.
#[derive(Debug, Clone)]
pub struct Expression {
    text: String,
    parsed: FlatEx<Exact, Operators>,
    properties: Vec<String>,
}

impl Expression {
    /// # Errors
    /// What is wrong with the text, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed = FlatEx::<Exact, Operators>::parse(&infix(&with_braces(text))?).map_err(|error| error.to_string())?;
        let properties = parsed.var_names().to_vec();
        if properties.is_empty() {
            return Err("it names no property".to_owned());
        }
        Ok(Expression { text: text.to_owned(), parsed, properties })
    }

    /// As it is written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The properties that it needs, in the order in which [`Expression::evaluate`] takes their values.
    pub fn properties(&self) -> &[String] {
        &self.properties
    }

    /// # Errors
    /// [`ExpressionError`] for a division by zero and beyond 38 digits.
    pub fn evaluate(&self, values: &[Decimal]) -> Result<Decimal, ExpressionError> {
        let values: Vec<_> = values.iter().map(|value| Exact(Ok(*value))).collect();
        self.parsed.eval(&values).map_err(|_| ExpressionError::Syntax)?.0
    }
}

/// Puts every property in braces, so that paths with dots are one name.
fn with_braces(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.');
        let length = match first {
            '{' => rest.find('}').map_or(rest.len(), |end| end + 1),
            _ if first.is_alphabetic() || matches!(first, '_' | '$') => {
                rest.char_indices().skip(1).find(|(_, c)| !is_name(*c)).map_or(rest.len(), |(end, _)| end)
            }
            // A number keeps its digits and point together.
            _ if first.is_ascii_digit() => rest.find(|c: char| !is_name(c)).unwrap_or(rest.len()),
            _ => first.len_utf8(),
        };
        let (word, after) = rest.split_at_checked(length).unwrap_or((rest, ""));
        let is_property = (first.is_alphabetic() || matches!(first, '_' | '$')) && !FUNCTIONS.contains(&word);
        if is_property {
            out.push('{');
            out.push_str(word.strip_prefix("$.").unwrap_or(word));
            out.push('}');
        } else {
            out.push_str(word);
        }
        rest = after;
    }
    out
}

/// Writes `min(a, b)` as `((a) min (b))`: the library reads no call within the second value of another.
fn infix(text: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '{' => rest.find('}').map_or(rest.len(), |end| end + 1),
            _ if first.is_alphabetic() => rest.find(|c: char| !c.is_alphanumeric()).unwrap_or(rest.len()),
            _ => first.len_utf8(),
        };
        let (word, after) = rest.split_at_checked(length).unwrap_or((rest, ""));
        // Between two values it is written as it is.
        let is_operator = out.trim_end().ends_with(|c: char| matches!(c, ')' | '}') || c.is_ascii_digit());
        let call = after.trim_start().strip_prefix('(').filter(|_| ["min", "max"].contains(&word) && !is_operator);
        let Some((values, after)) = call.and_then(values) else {
            out.push_str(word);
            rest = after;
            continue;
        };
        let [first, second] = values.as_slice() else {
            return Err(format!("`{word}` takes two values, here are {}", values.len()));
        };
        out.push_str(&format!("(({}) {word} ({}))", infix(first)?, infix(second)?));
        rest = after;
    }
    Ok(out)
}

/// The values of a call, from after its opening parenthesis, and what comes after the closing one.
fn values(text: &str) -> Option<(Vec<&str>, &str)> {
    let (mut depth, mut in_name, mut start, mut found) = (0_u32, false, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '{' | '}' => in_name = c == '{',
            _ if in_name => {}
            '(' => depth += 1,
            ')' | ',' if depth == 0 => {
                found.push(text.get(start..at)?);
                start = at + 1;
                if c == ')' {
                    return Some((found, text.get(start..)?));
                }
            }
            ')' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str, values: &[(&str, &str)]) -> Result<String, String> {
        let expression = Expression::parse(text)?;
        let of = |name: &String| values.iter().find(|(known, _)| known == name).unwrap().1.parse().unwrap();
        let values: Vec<_> = expression.properties().iter().map(of).collect();
        expression.evaluate(&values).map(|value| value.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn exact_arithmetic_in_the_usual_order() {
        let is = |text: &str, expected: &str| {
            let values = [("a", "0.1"), ("b", "0.2"), ("usage.out", "3"), ("z", "0")];
            assert_eq!(value(text, &values).as_deref(), Ok(expected), "{text}");
        };
        is("a + b", "0.3");
        is("a + 4 * usage.out", "12.1");
        is("(a + 4) * $.usage.out", "12.3");
        is("10 - 3 - a", "6.9");
        is("8 / 2 / 2 + z", "2");
        is("8 / 2 * 4 + z", "16");
        is("2 - 1 + z + 5", "6");
        is("-a - -b", "0.1");
        is("max(a, b) * 10 - min(a, b)", "1.9");
        is("ceil(a) + floor(usage.out / 2) + round(b * 2.5) + abs(-b)", "3.2");
        is("0.1000000000000000005 + z", "0.100000000000000001");
        is("1000000 * a / 3", "33333.333333333333333333");
        is("{usage.out} * 2", "6");
        is("max(0, min(usage.out, 2)) + z", "2");
        is("min(max(a, max (b, usage.out)), 10 * abs(min(b, -a))) * 2", "2");
        is("usage.out min (a + b)", "0.3");
        is("max({a}, b * min(usage.out, 2)) - z", "0.4");
    }

    #[test]
    fn failures_are_told() {
        assert_eq!(value("1 / z", &[("z", "0")]).unwrap_err(), "divides by zero");
        assert!(value("z * z", &[("z", "99999999999999999999")]).unwrap_err().contains("38 digits"));
        for text in [
            "",
            "a +",
            "(a",
            "a b",
            "1 + 2",
            "a ** b",
            "system('x')",
            "a; b",
            "a)",
            "min(a",
            "min(a)",
            "max(a, b, c)",
            "min(a, )",
        ] {
            assert!(Expression::parse(text).is_err(), "{text}");
        }
    }
}
