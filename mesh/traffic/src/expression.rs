//! Expressions in CEL: compiled when a policy arrives, evaluated for each request.
//!
//! An expression is bounded: in its size, in its nesting, and in what it can do. It has no loops (`all`, `exists`, `map`, `filter`
//! are refused), so that evaluating it costs at most one step for each of its nodes.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, LazyLock};

use cel::common::ast::{EntryExpr, Expr, IdedExpr, operators};
use cel::context::VariableResolver;
use cel::parser::Parser;
use cel::{Context, Env, ExecutionError, Value};

use crate::compile_thread;
use crate::facts::{Facts, OF_REQUESTS, Variables};

/// Most bytes of an expression.
pub const MAX_SIZE: usize = 2048;
/// Most levels of an expression's tree.
pub const MAX_NESTING: usize = 16;

/// Functions that expressions may call, operators included.
const FUNCTIONS: [&str; 25] = [
    operators::CONDITIONAL,
    operators::LOGICAL_AND,
    operators::LOGICAL_OR,
    operators::LOGICAL_NOT,
    operators::SUBSTRACT,
    operators::ADD,
    operators::MULTIPLY,
    operators::DIVIDE,
    operators::MODULO,
    operators::EQUALS,
    operators::NOT_EQUALS,
    operators::GREATER_EQUALS,
    operators::LESS_EQUALS,
    operators::GREATER,
    operators::LESS,
    operators::NEGATE,
    operators::INDEX,
    operators::IN,
    "size",
    "contains",
    "startsWith",
    "endsWith",
    "string",
    "int",
    "double",
];

/// Why an expression can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpressionError {
    /// It is too long.
    #[error("it has more than {MAX_SIZE} bytes")]
    TooLong,
    /// It is nested too deeply.
    #[error("it is nested more than {MAX_NESTING} levels deep")]
    TooDeep,
    /// It is not CEL.
    #[error("it is no expression of CEL: {0}")]
    Syntax(String),
    /// It has a loop.
    #[error("all, exists, exists_one, map and filter are not available")]
    Loop,
    /// It uses a name that stands for nothing.
    #[error("{0} is not known")]
    UnknownVariable(String),
    /// It calls a function that there is not.
    #[error("there is no function {0}")]
    UnknownFunction(String),
    /// There was no thread to parse it on, or the parser failed.
    #[error("it can't be parsed now: {0}")]
    Parser(String),
}

/// Why an expression has no truth value for a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvaluationError {
    /// Something that it asks for is not there.
    #[error("{0} is not there")]
    Missing(String),
    /// Values are not of the types that it needs.
    #[error("a value is not of the type that the expression needs")]
    Type,
    /// It is neither true nor false.
    #[error("the expression is neither true nor false")]
    NotBool,
}

/// A compiled expression. Cheap to clone.
#[derive(Clone)]
pub struct Expression {
    text: Arc<str>,
    tree: Arc<IdedExpr>,
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Expression").field(&self.text).finish()
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

/// What an expression may ask for.
#[derive(Debug)]
pub(crate) struct Names {
    /// All names.
    pub(crate) variables: &'static [&'static str],
    /// Those of them that have fields.
    pub(crate) maps: &'static [&'static str],
}

impl Expression {
    /// Compiles an expression, on a thread with a stack that the parser can't exhaust. All of the process's are compiled on one, one after
    /// the other.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn compile(text: &str) -> Result<Self, ExpressionError> {
        Self::compile_with(text, &OF_REQUESTS)
    }

    pub(crate) fn compile_with(text: &str, names: &'static Names) -> Result<Self, ExpressionError> {
        if text.len() > MAX_SIZE {
            return Err(ExpressionError::TooLong);
        }
        let tree = compile_thread::run(text, names)?;
        Ok(Self { text: text.into(), tree: Arc::new(tree) })
    }

    /// The expression as it is written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The variables that it asks for, by the names that [`Facts`] has them: `request.headers` for any header.
    pub fn variables(&self) -> BTreeSet<&'static str> {
        let mut variables = BTreeSet::new();
        collect(&self.tree, &mut variables);
        variables
    }

    /// Whether it holds for a request.
    ///
    /// # Errors
    /// Where it asks for something that is not there, or is no truth value. Whoever asks fails closed.
    pub fn holds(&self, facts: &Facts<'_>) -> Result<bool, EvaluationError> {
        self.evaluate(&Variables::new(facts))
    }

    pub(crate) fn evaluate(&self, variables: &dyn VariableResolver) -> Result<bool, EvaluationError> {
        static ROOT: LazyLock<Context<'static, 'static>> =
            LazyLock::new(|| Context::with_env(Arc::new(Env::stdlib())));
        let root: &Context<'_, '_> = &ROOT;
        let mut context = root.new_inner_scope();
        context.set_variable_resolver(variables);
        match Value::resolve(&self.tree, &context) {
            Ok(Value::Bool(holds)) => Ok(holds),
            Ok(_) => Err(EvaluationError::NotBool),
            Err(ExecutionError::NoSuchKey(key)) => Err(EvaluationError::Missing(key.to_string())),
            Err(ExecutionError::UndeclaredReference(name)) => Err(EvaluationError::Missing(name.to_string())),
            // Values of the request are nobody's business in a log.
            Err(_) => Err(EvaluationError::Type),
        }
    }
}

/// Parses and checks an expression. Recurses as deep as that is nested, to drop a tree that is too deep too.
pub(crate) fn parse(text: &str, names: &Names) -> Result<IdedExpr, ExpressionError> {
    let tree = Parser::new().parse(text).map_err(|errors| {
        let first = errors.errors.first().map(|error| error.msg.clone());
        ExpressionError::Syntax(first.unwrap_or_default())
    })?;
    check(&tree, 1, names).map(|()| tree)
}

/// Checks that a tree is shallow, has no loop, and asks only for what there is.
fn check(expression: &IdedExpr, level: usize, names: &Names) -> Result<(), ExpressionError> {
    if level > MAX_NESTING {
        return Err(ExpressionError::TooDeep);
    }
    let inner = |expression| check(expression, level + 1, names);
    match &expression.expr {
        Expr::Unspecified => Err(ExpressionError::Syntax("it is empty".to_owned())),
        Expr::Literal(_) => Ok(()),
        Expr::Ident(name) => check_name(name, names),
        Expr::Select(select) => match name_of(expression) {
            Some(Ok(name)) => check_name(&name, names),
            Some(Err(deep)) => Err(deep),
            None => inner(&select.operand),
        },
        Expr::Call(call) => {
            if !FUNCTIONS.contains(&call.func_name.as_str()) {
                return Err(ExpressionError::UnknownFunction(call.func_name.clone()));
            }
            call.target.iter().try_for_each(|target| inner(target))?;
            call.args.iter().try_for_each(inner)
        }
        Expr::List(list) => list.elements.iter().try_for_each(inner),
        Expr::Map(map) => map.entries.iter().try_for_each(|entry| match &entry.expr {
            EntryExpr::MapEntry(entry) => inner(&entry.key).and_then(|()| inner(&entry.value)),
            EntryExpr::StructField(field) => inner(&field.value),
        }),
        Expr::Comprehension(_) => Err(ExpressionError::Loop),
        Expr::Struct(of_type) => Err(ExpressionError::UnknownFunction(of_type.type_name.clone())),
    }
}

/// Adds the variables that a checked tree asks for.
fn collect(expression: &IdedExpr, variables: &mut BTreeSet<&'static str>) {
    if let Some(Ok(name)) = name_of(expression) {
        let is_in = |known: &&&'static str| {
            name.strip_prefix(**known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        return variables.extend(OF_REQUESTS.variables.iter().find(is_in));
    }
    let mut inner = |expression| collect(expression, variables);
    match &expression.expr {
        Expr::Unspecified | Expr::Literal(_) | Expr::Ident(_) | Expr::Comprehension(_) | Expr::Struct(_) => {}
        Expr::Select(select) => inner(&select.operand),
        Expr::Call(call) => {
            call.target.iter().for_each(|target| inner(target));
            call.args.iter().for_each(inner);
        }
        Expr::List(list) => list.elements.iter().for_each(inner),
        Expr::Map(map) => map.entries.iter().for_each(|entry| match &entry.expr {
            EntryExpr::MapEntry(entry) => {
                inner(&entry.key);
                inner(&entry.value);
            }
            EntryExpr::StructField(field) => inner(&field.value),
        }),
    }
}

/// The name that fields of fields of an identifier spell, without the field that `has()` asks for; `None` for fields of anything else.
fn name_of(expression: &IdedExpr) -> Option<Result<String, ExpressionError>> {
    let mut segments = Vec::new();
    let mut inner = &expression.expr;
    loop {
        match inner {
            Expr::Ident(name) => {
                segments.push(name.as_str());
                segments.reverse();
                return Some(Ok(segments.join(".")));
            }
            Expr::Select(select) => {
                if segments.len() >= MAX_NESTING {
                    return Some(Err(ExpressionError::TooDeep));
                }
                if !select.test {
                    segments.push(select.field.as_str());
                }
                inner = &select.operand.expr;
            }
            _ => return None,
        }
    }
}

fn check_name(name: &str, names: &Names) -> Result<(), ExpressionError> {
    let is_field = |map: &str| name.strip_prefix(map).is_some_and(|rest| rest.starts_with('.'));
    match names.variables.contains(&name) || names.maps.iter().any(|map| is_field(map)) {
        true => Ok(()),
        false => Err(ExpressionError::UnknownVariable(name.to_owned())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use http::{HeaderMap, HeaderName, HeaderValue};
    use serde_json::json;

    use super::*;
    use crate::facts::{DestinationFacts, RequestFacts, SourceFacts};

    fn headers() -> HeaderMap {
        let field = |name: &'static str, value: &'static str| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        HeaderMap::from_iter([field("x-user", "anna"), field("x-list", "a"), field("x-list", "b")])
    }

    fn with_facts<R>(act: impl FnOnce(&Facts<'_>) -> R) -> R {
        let headers = headers();
        let claims = json!({ "sub": "anna", "groups": ["a", "b"], "age": 7, "org": { "id": "x" } });
        let request = RequestFacts {
            method: "GET",
            path: "/api/v1",
            query: Some("a=1&b=x%20y&a=2"),
            host: "web.example",
            scheme: "http",
            headers: &headers,
            principal: Some("https://issuer/anna"),
            claims: claims.as_object(),
        };
        act(&Facts {
            request: Some(request),
            source: SourceFacts {
                identity: Some("spiffe://cluster.local/ns/shop/sa/cli"),
                namespace: Some("shop"),
                address: Some([10, 0, 0, 1].into()),
                peer_address: [10, 0, 0, 1].into(),
            },
            destination: DestinationFacts { host: "web.shop.svc.cluster.local", namespace: "shop", port: 80 },
        })
    }

    fn holds(text: &str) -> Result<bool, EvaluationError> {
        with_facts(|facts| Expression::compile(text).unwrap().holds(facts))
    }

    #[test]
    fn each_variable_has_its_value() {
        for text in [
            "request.method == 'GET'",
            "request.path.startsWith('/api/')",
            "request.host.endsWith('.example')",
            "request.scheme in ['http', 'https']",
            "request.headers['x-user'] == 'anna'",
            "request.headers['x-list'] == 'a,b'",
            "'x-user' in request.headers && !('x-other' in request.headers)",
            "request.query['a'] == '1,2' && request.query['b'] == 'x y'",
            "request.query.b.contains(' ')",
            "has(request.query.a) && !has(request.query.c)",
            "request.auth.principal == 'https://issuer/anna'",
            "request.auth.claims.sub == 'anna'",
            "'b' in request.auth.claims.groups",
            "request.auth.claims['org']['id'] == 'x' && request.auth.claims.org.id == 'x'",
            "request.auth.claims.age > 5",
            "has(request.auth.claims.sub) && !has(request.auth.claims.exp)",
            "source.identity == 'spiffe://cluster.local/ns/shop/sa/cli'",
            "source.namespace == destination.namespace",
            "source.address == '10.0.0.1'",
            "destination.host.startsWith('web.') && destination.port == 80",
            "size(request.path) == 7 && (request.method == 'GET' ? true : false)",
            "int(request.auth.claims.age) - 1 == 6",
        ] {
            assert_eq!(holds(text), Ok(true), "{text}");
        }
        assert_eq!(holds("request.method == 'POST'"), Ok(false));
    }

    #[test]
    fn an_expression_says_what_it_asks_for() {
        for (text, wanted) in [
            ("true", &[][..]),
            ("request.method == 'GET' || request.path == '/'", &["request.method", "request.path"]),
            ("request.headers['x'] == 'a'", &["request.headers"]),
            ("request.headers.x == 'a' && has(request.query.a)", &["request.headers", "request.query"]),
            ("has(request.auth.claims.sub)", &["request.auth.claims"]),
            (
                "request.auth.claims.org['id'] in ['x', source.namespace]",
                &["request.auth.claims", "source.namespace"],
            ),
            ("size({request.host: [destination.port]}) > int('0')", &["destination.port", "request.host"]),
        ] {
            let found = Expression::compile(text).unwrap();
            assert_eq!(found.variables().into_iter().collect::<Vec<_>>(), wanted, "{text}");
        }
    }

    #[test]
    fn what_is_not_there_is_an_error_and_no_answer() {
        for text in [
            "request.headers['x-other'] == 'a'",
            "request.headers['x-other'] != 'a'",
            "!(request.auth.claims.exp == 3)",
            "request.method",
            "request.path > 3",
            "request.method",
        ] {
            assert!(holds(text).is_err(), "{text}");
        }
        // As the specification of CEL has it.
        assert_eq!(holds("request.headers['x-other'] == 'a' || request.method == 'GET'"), Ok(true));
    }

    #[test]
    fn a_connection_has_no_request() {
        let compile = |text| Expression::compile(text).unwrap();
        with_facts(|facts| {
            let connection = Facts { request: None, ..*facts };
            assert!(compile("request.method != 'GET'").holds(&connection).is_err());
            assert!(compile("!('x-user' in request.headers)").holds(&connection).is_err());
            assert!(compile("request.auth.principal == ''").holds(&connection).is_err());
            assert_eq!(compile("source.namespace == 'shop'").holds(&connection), Ok(true));
        });
    }

    #[test]
    fn a_client_without_identity_or_token_has_empty_ones() {
        with_facts(|facts| {
            let source = SourceFacts { identity: None, namespace: None, ..facts.source };
            let request = facts.request.map(|it| RequestFacts { principal: None, claims: None, ..it });
            let facts = Facts { request, source, ..*facts };
            for text in [
                "source.identity == '' && source.namespace == ''",
                "request.auth.principal == ''",
                "!has(request.auth.claims.sub) && size(request.auth.claims) == 0",
            ] {
                assert_eq!(Expression::compile(text).unwrap().holds(&facts), Ok(true), "{text}");
            }
        });
    }

    #[test]
    fn unknown_names_and_loops_are_refused() {
        use ExpressionError::{Loop, UnknownFunction, UnknownVariable};
        let error = |text: &str| Expression::compile(text).unwrap_err();
        assert_eq!(error("request.pth == 'a'"), UnknownVariable("request.pth".to_owned()));
        assert_eq!(error("requests.path == 'a'"), UnknownVariable("requests.path".to_owned()));
        assert_eq!(error("request == 1"), UnknownVariable("request".to_owned()));
        assert_eq!(error("has(request.path)"), UnknownVariable("request".to_owned()));
        assert_eq!(error("request.method.a == 'b'"), UnknownVariable("request.method.a".to_owned()));
        for text in ["[1].all(x, x > 0)", "[1].map(x, x)[0] == 1", "request.headers.exists(x, x == 'a')"] {
            assert_eq!(error(text), Loop, "{text}");
        }
        assert_eq!(error("foo(1)"), UnknownFunction("foo".to_owned()));
        assert!(matches!(error("Message{a: 1} == 1"), UnknownFunction(_)));
        for text in ["", "request.method ==", "a b", "'open", "request.headers['x'"] {
            assert!(matches!(error(text), ExpressionError::Syntax(_)), "{text}: {:?}", error(text));
        }
    }

    /// Each grows by its own way through the grammar.
    #[test]
    fn size_and_nesting_are_bounded() {
        let of = |unit: &str, count: usize, end: &str| format!("{}{end}", unit.repeat(count));
        assert_eq!(Expression::compile(&of("a", MAX_SIZE + 1, "")), Err(ExpressionError::TooLong));
        let deep = [
            format!("{}true{}", "(".repeat(1000), ")".repeat(1000)),
            of("!", MAX_SIZE - 4, "true"),
            of("!(", 300, "true") + &")".repeat(300),
            of("-", MAX_SIZE - 8, "1 == 1"),
            of("true ? true : ", 100, "true"),
            of("[", 1000, "") + &"]".repeat(1000),
            of("1 + ", 500, "1") + " == 1",
            format!("request.headers{} == 1", ".a".repeat(900)),
            format!("request.headers{} == 1", "[0]".repeat(600)),
            of("size(", 300, "1") + &")".repeat(300) + " == 1",
            of("{1:", 500, "1") + &"}".repeat(500) + " == 1",
        ];
        for text in deep {
            assert!(text.len() <= MAX_SIZE, "{}", text.len());
            let compiled = Expression::compile(&text);
            // Signs that cancel each other out, and parentheses, are no levels.
            if let Ok(expression) = compiled {
                assert!(with_facts(|facts| expression.holds(facts)) == Ok(true), "{text}");
            }
        }
        for text in [of("1 + ", 500, "1 == 1"), format!("request.headers{} == 1", ".a".repeat(20))] {
            assert_eq!(Expression::compile(&text), Err(ExpressionError::TooDeep), "{text}");
        }
        let alternatives = (0..60).map(|at| format!("request.path == '/{at}'"));
        let many = alternatives.collect::<Vec<_>>().join(" || ");
        assert_eq!(holds(&many), Ok(false), "alternatives are balanced");
        let eight = of("!(", 8, "request.method == 'GET'") + &")".repeat(8);
        assert_eq!(holds(&eight), Ok(true));
    }
}
