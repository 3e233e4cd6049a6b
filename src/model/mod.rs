//! What the pipeline talks about. No I/O.

pub mod aggregate;
pub mod basis;
pub mod calendar;
pub mod causes;
pub mod columns;
pub mod counts;
pub mod decimal;
pub mod decimal_sum;
pub mod digest;
pub mod expression;
mod hopping;
mod json_scanner;
pub mod meter;
pub mod percentage;
pub mod price;
pub mod price_lines;
pub mod properties;
pub mod property;
pub mod run;
pub mod spans;
pub mod timestamp;
pub mod window;
